
// -- ranks -----------------------------------------------------------------------------------------------------------
// Of the same script as dashboard.js, and shown only where the server has ranks with processes of their own.

const EVENTS_SHOWN = 4;
const STATES = { active: "good", draining: "warn", starting: "warn", ready: "warn", drained: "soft", away: "bad" };

const milliseconds = (seconds) => `${whole.format(seconds * 1000)} ms`;

function showRanks(cluster) {
  byId("ranks-panel").hidden = cluster === null;
  if (cluster === null) return;
  const active = cluster.ranks.filter((rank) => ["active", "draining"].includes(rank.state)).length;
  show("ranks-active", count(active), active);
  show("ranks-capacity", `of ${cluster.capacity}`, cluster.capacity);
  show("ranks-epoch", count(cluster.epoch), cluster.epoch);
  show("min-copies", count(cluster.min_copies), cluster.min_copies);
  byId("refusal").hidden = cluster.refusal === null;
  show("refusal", cluster.refusal === null ? "" : `Nothing is served: ${cluster.refusal}`);
  showRankRows(cluster.ranks);
  showEvents(cluster.events.slice(-EVENTS_SHOWN).reverse());
}

function showRankRows(ranks) {
  const rows = byId("ranks");
  if (rows.children.length !== ranks.length) {
    rows.replaceChildren();
    for (const rank of ranks) {
      const row = make(rows, "tr");
      make(row, "th", { scope: "row" }, `Rank ${rank.rank}`);
      make(make(row, "td"), "span");
      for (let i = 0; i < 4; i++) make(row, "td");
    }
  }
  ranks.forEach((rank, i) => {
    const [, state, ...figures] = rows.children[i].children;
    state.firstChild.textContent = rank.state;
    state.firstChild.className = `state ${STATES[rank.state] ?? "soft"}`;
    const pid = rank.pid === null ? "–" : String(rank.pid);
    const incarnation = rank.incarnation < 0 ? "–" : count(rank.incarnation);
    [count(rank.experts), incarnation, pid, count(rank.compiles)].forEach((text, j) => {
      figures[j].textContent = text;
    });
  });
}

/** The latest changes, each with a bar per phase; all bars have one scale. */
function showEvents(events) {
  const list = byId("events");
  const shape = JSON.stringify(events);
  if (list.dataset.shape === shape) return;
  list.dataset.shape = shape;
  list.replaceChildren();
  byId("events-none").hidden = events.length > 0;
  const longest = Math.max(...events.flatMap((event) => Object.values(event.phases)), 1e-9);
  for (const event of events) {
    const item = make(list, "li", { "data-type": event.type, "data-epoch": event.epoch });
    const which = event.ranks.length > 1 ? `Ranks ${event.ranks.join(", ")}` : `Rank ${event.ranks[0]}`;
    make(item, "h4", {}, event.ranks.length ? `${which} ${event.type}` : `Step ${event.type}`);
    make(item, "p", { class: "note" }, `${clock(event.at)}, epoch ${event.epoch}: ${milliseconds(event.seconds)} pause`);
    const phases = make(item, "dl", { class: "phases" });
    for (const [name, seconds] of Object.entries(event.phases)) {
      make(phases, "dt", {}, name);
      const bar = make(make(phases, "dd", { class: "track" }), "i");
      bar.style.width = `${(100 * seconds) / longest}%`;
      make(phases, "dd", { "data-phase": name, "data-value": seconds }, milliseconds(seconds));
    }
  }
}
