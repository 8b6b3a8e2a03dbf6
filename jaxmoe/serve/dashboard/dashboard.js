"use strict";

const SPANS_S = [60, 120, 300]; // of the timelines: the first that all points fit into
const LONGEST_S = 300;
const SILENCE_MS = 10000; // without an event the connection counts as lost
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

function count(value) {
  return value === null || value === undefined ? "–" : whole.format(value);
}

function rate(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? whole.format(value) : short.format(value);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${short.format(seconds * 1000)} ms`;
  if (seconds < 10) return `${short.format(seconds)} s`;
  if (seconds < 120) return `${whole.format(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A past time span in whole seconds or minutes, as in "the last ...". */
function ago(seconds) {
  return seconds < 120 ? `${Math.max(1, Math.round(seconds))} s` : duration(seconds);
}

function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = share * 100;
  return `${value < 10 ? value.toFixed(1) : whole.format(value)}%`;
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

/** Shows a text; the number behind it stays readable for scripts as data-value. */
function show(id, text, value) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
  if (value !== undefined && value !== null) element.dataset.value = value;
}

function make(parent, name, attributes = {}, text) {
  const svg = parent instanceof SVGElement || name === "svg";
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// -- timelines -------------------------------------------------------------------------------------------------------

/** The next round number that is at least value. */
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 1.6, 2, 3, 4, 5, 6, 8, 10].map((m) => m * power).find((top) => top >= value);
}

class Chart {
  /** Lines over the last minutes. A series is [name, index into a point]. */
  constructor(id, series) {
    this.box = byId(id);
    this.unit = this.box.dataset.unit;
    this.series = series;
    this.points = [];
    this.pointer = null;
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.box.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.box.addEventListener("pointerdown", (event) => this.point(event.offsetX));
    this.box.addEventListener("pointerleave", () => this.point(null));
  }

  point(x) {
    this.pointer = x;
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.box;
    if (!width) return;
    const end = this.points.length ? this.points[this.points.length - 1][0] : 0;
    const seen = this.points.filter((p) => p[0] >= end - LONGEST_S);
    const age = seen.length ? end - seen[0][0] : 0;
    const span = SPANS_S.find((s) => s >= age);
    const most = Math.max(0, ...seen.flatMap((p) => this.series.map(([, i]) => p[i] ?? 0)));
    const frame = { left: 44, right: width - 8, top: 24, bottom: height - 22, end, age, span, high: niceTop(most) };
    this.box.replaceChildren();
    const svg = make(this.box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    this.axes(svg, frame);
    for (const [name, index] of this.series.toReversed()) { // the first on top
      make(svg, "path", { class: name, d: this.path(seen, index, frame) });
    }
    this.describe(svg, seen, frame, most);
    this.cursor(svg, seen, frame);
  }

  x(time, frame) {
    return frame.right - ((frame.end - time) / frame.span) * (frame.right - frame.left);
  }

  y(value, frame) {
    return frame.bottom - (value / frame.high) * (frame.bottom - frame.top);
  }

  axes(svg, frame) {
    for (const share of [0, 0.5, 1]) {
      const y = Math.round(this.y(share * frame.high, frame));
      make(svg, "line", { class: "grid", x1: frame.left, x2: frame.right, y1: y, y2: y });
      const label = share * frame.high;
      if (Number.isInteger(label) || frame.high > 2) {
        make(svg, "text", { x: frame.left - 6, y: y + 4, "text-anchor": "end" }, short.format(label));
      }
    }
    make(svg, "text", { x: 0, y: 9 }, this.unit);
    const y = frame.bottom + 16;
    make(svg, "text", { x: frame.left, y }, `${frame.span / 60} min ago`);
    make(svg, "text", { x: frame.right, y, "text-anchor": "end" }, "now");
  }

  /** A line; it breaks where nothing was measured and over gaps, e.g. while the server was away. */
  path(points, index, frame) {
    let text = "";
    let last = null;
    for (const point of points) {
      if (point[index] === null) {
        last = null;
        continue;
      }
      const move = last === null || point[0] - last > 5 ? "M" : "L";
      text += `${move}${this.x(point[0], frame).toFixed(1)} ${this.y(point[index], frame).toFixed(1)}`;
      last = point[0];
    }
    return text;
  }

  describe(svg, seen, frame, most) {
    const latest = seen[seen.length - 1];
    const now = this.series.map(([name, i]) => `${name} ${latest ? rate(latest[i]) : "unknown"}`).join(", ");
    svg.setAttribute("aria-label", `Last ${ago(frame.age)} in ${this.unit}. Now: ${now}. Highest: ${rate(most)}.`);
    if (most > 0) return;
    const text = latest ? `Nothing in the last ${ago(frame.age)}` : "No figures yet";
    make(svg, "text", { x: (frame.left + frame.right) / 2, y: frame.bottom - 12, "text-anchor": "middle" }, text);
  }

  cursor(svg, seen, frame) {
    if (this.pointer === null || !seen.length) return;
    const distance = (p) => Math.abs(this.x(p[0], frame) - this.pointer);
    const near = seen.reduce((best, p) => (distance(p) < distance(best) ? p : best));
    const x = this.x(near[0], frame);
    make(svg, "line", { class: "cursor", x1: x, x2: x, y1: frame.top, y2: frame.bottom });
    const values = this.series.map(([name, i]) => `${name} ${rate(near[i])}`).join(", ");
    const tip = make(this.box, "div", { class: "tip" }, `${clock(near[0])}: ${values}`);
    const left = Math.min(Math.max(x - tip.offsetWidth / 2, 0), this.box.clientWidth - tip.offsetWidth);
    tip.style.left = `${left}px`;
  }
}

const charts = [
  new Chart("chart-rate", [["output", 1], ["prompt", 2]]),
  new Chart("chart-queue", [["running", 3], ["waiting", 4]]),
  new Chart("chart-pages", [["held", 5]]),
];
let points = [];

function setPoints(next) {
  points = next.slice(-2 * LONGEST_S);
  for (const chart of charts) {
    chart.points = points;
    chart.draw();
  }
}

// -- experts ---------------------------------------------------------------------------------------------------------

let chosen = null; // "rank expert" whose figures are spelled out below the map

function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}

const slotsOf = (ranks) => sum(ranks.map((r) => r.experts.length));

/** One of seven shades: the middle one is the mean, the last twice the mean or more. */
function shade(times) {
  return Math.min(6, Math.round(times * 3));
}

function heatCells(ranks) {
  const heat = byId("heat");
  const shape = JSON.stringify(ranks.map((r) => r.experts));
  if (heat.dataset.shape === shape) return;
  heat.dataset.shape = shape;
  heat.replaceChildren();
  ranks.forEach((rank, r) => {
    const row = make(heat, "div", { class: "rank" });
    const title = make(row, "h3", {}, `Rank ${r}`);
    make(title, "small");
    const cells = make(row, "ul", { class: "cells", "aria-label": `Experts of rank ${r}` });
    rank.experts.forEach((expert, i) => {
      const button = make(make(cells, "li"), "button", { type: "button", class: "cell" });
      make(button, "b", {}, String(expert));
      make(button, "span", {}, "–");
      button.addEventListener("click", () => {
        chosen = [r, i];
        if (latest) showLoad(latest.load);
      });
    });
  });
}

function showLoad(load) {
  const ranks = load.ranks;
  heatCells(ranks);
  const sums = { recent: sum(ranks.map((r) => sum(r.recent))), total: sum(ranks.map((r) => sum(r.total))) };
  const slots = slotsOf(ranks);
  const which = sums.recent > 0 ? "recent" : "total";
  const mean = slots ? sums[which] / slots : 0;
  const window = ago(watched(load.window_s));
  show("load-window", !sums.total ? "" : which === "recent" ? `last ${window}` : "since the start");
  byId("scale").hidden = mean === 0;
  const rows = byId("heat").children;
  ranks.forEach((rank, r) => {
    const tokens = sum(rank[which]);
    const share = sums[which] ? `${percent(tokens / sums[which])} of the load` : "no load yet";
    rows[r].querySelector("small").textContent = share;
    rank[which].forEach((value, i) => showCell(rows[r].querySelectorAll("button")[i], rank.experts[i], value, mean));
  });
  show("load-note", loadNote(ranks, which, mean, slots, window));
  showDetail(ranks, which, mean);
}

function showCell(button, expert, value, mean) {
  const times = mean ? value / mean : null;
  button.className = times === null ? "cell" : `cell h${shade(times)}`;
  button.lastChild.textContent = times === null ? "–" : `${times.toFixed(1)}×`;
  button.dataset.value = value;
  const load = times === null ? "no load yet" : `${times.toFixed(1)} times the mean`;
  button.setAttribute("aria-label", `Expert ${expert}: ${load}`);
}

function loadNote(ranks, which, mean, slots, window) {
  if (!slots) return latest.cluster ? "No rank holds experts at present." : "This model has no routed experts.";
  if (!mean) return "No token has reached an expert yet.";
  const most = Math.max(...ranks.flatMap((r) => r[which]));
  const perRank = ranks.map((r) => sum(r[which]));
  const busiest = Math.max(...perRank) / (sum(perRank) / perRank.length);
  const ranksText = ranks.length > 1 ? `, busiest rank ${busiest.toFixed(2)}×` : "";
  const idle = which === "total" ? ` Idle for the last ${window}.` : "";
  return `Number above: expert; below: load over the mean, all layers. Busiest expert ${(most / mean).toFixed(2)}×${ranksText}.${idle}`;
}

function showDetail(ranks, which, mean) {
  const rank = chosen && ranks[chosen[0]];
  if (!rank || rank.experts.length <= chosen[1]) {
    show("expert-detail", slotsOf(ranks) ? "Choose an expert for its figures." : "");
    return;
  }
  const i = chosen[1];
  const times = mean ? `, ${(rank[which][i] / mean).toFixed(2)} times the mean` : "";
  show("expert-detail", `Expert ${rank.experts[i]} on rank ${chosen[0]}: ${count(rank.total[i])} token visits since the start${times}.`);
}

// -- figures ---------------------------------------------------------------------------------------------------------

let latest = null;
let hello = null;

/** How much of a window the server has seen so far. */
function watched(seconds) {
  return Math.min(seconds, latest.time - hello.started);
}

function showLatency(latency) {
  for (const name of ["ttft", "tpot"]) {
    const cells = byId(name).querySelectorAll("td");
    ["p50", "p90", "p99"].forEach((q, i) => {
      const value = latency[name] ? latency[name][q] : null;
      cells[i].textContent = duration(value);
      cells[i].dataset.value = value ?? "";
    });
  }
  const span = ago(watched(latency.window_s));
  show("latency-window", `last ${span}`);
  const n = latency.ttft_count;
  show("latency-note", n ? `From ${count(n)} first tokens and ${count(latency.tpot_count)} finished requests.` : `No token came out in the last ${span}.`);
}

function showPages(pages) {
  const free = pages.total - pages.held - pages.idle;
  const share = (n) => `${count(n)} (${percent(pages.total ? n / pages.total : 0)})`;
  show("pages-held", share(pages.held), pages.held);
  show("pages-idle", share(pages.idle), pages.idle);
  show("pages-free", share(free), free);
  const bar = byId("pages-bar");
  bar.children[0].style.width = `${(100 * pages.held) / pages.total}%`;
  bar.children[1].style.width = `${(100 * pages.idle) / pages.total}%`;
  bar.setAttribute("aria-label", `${count(pages.held)} of ${count(pages.total)} pages held, ${count(pages.idle)} kept for reuse`);
}

function showFinished(finished) {
  const list = byId("finished");
  const entries = Object.entries(finished).filter(([, n]) => n > 0);
  if (!entries.length) entries.push(["none yet", ""]);
  list.replaceChildren();
  for (const [reason, n] of entries) {
    const row = make(list, "div");
    make(row, "dt", {}, reason);
    make(row, "dd", n === "" ? {} : { "data-reason": reason, "data-value": n }, n === "" ? "" : count(n));
  }
}

function showSnapshot(snapshot) {
  latest = snapshot;
  const { throughput, totals } = snapshot;
  show("rate-output", rate(throughput.output), throughput.output);
  show("rate-prompt", rate(throughput.prompt), throughput.prompt);
  show("reused", totals.prompt ? percent(totals.cached / totals.prompt) : "–", totals.cached);
  for (const name of ["running", "waiting", "preemptions", "steps", "epoch"]) show(name, count(snapshot[name]), snapshot[name]);
  show("total-generated", count(totals.generated), totals.generated);
  show("total-prompt", count(totals.prompt), totals.prompt);
  show("step", duration(snapshot.step_s));
  show("schedule", percent(snapshot.schedule_share));
  show("uptime", `${clock(hello.started)}, ${ago(snapshot.time - hello.started)} ago`);
  showLatency(snapshot.latency);
  showPages(snapshot.pages);
  showFinished(snapshot.finished);
  showRanks(snapshot.cluster);
  showLoad(snapshot.load);
  setPoints([...points.filter((p) => p[0] < snapshot.time), snapshot.point]); // the greeting may have had it already
  byId("figures").setAttribute("aria-busy", "false");
  if (snapshot.draining) setStatus("draining", "Draining: no new requests");
  else if (snapshot.cluster && snapshot.cluster.refusal !== null) setStatus("lost", "Experts are missing: nothing is served");
  else setStatus("live", "Live");
}

// -- connection ------------------------------------------------------------------------------------------------------

function setStatus(state, text) {
  const status = byId("status");
  if (status.textContent === text) return;
  status.textContent = text;
  status.dataset.state = state;
}

function notice(text) {
  byId("notice").hidden = false;
  show("notice", text);
}

function greet(first) {
  if (hello && hello.instance !== first.instance) {
    notice(`The server restarted at ${clock(first.started)}; counters began again.`);
  } else if (hello && lostAt && !latest.draining) {
    notice(`Connected again after ${duration((Date.now() - lostAt) / 1000)}.`);
  }
  hello = first;
  lostAt = null;
  const start = first.timeline.length ? first.timeline[0][0] : Infinity;
  setPoints([...points.filter((p) => p[0] < start), ...first.timeline]);
}

let lostAt = null;
let abort = null;
let failures = 0;
let retry = 0;

/** One connection until it ends. Not EventSource, which gives up at a status other than 200 and doesn't say which. */
async function listen() {
  abort = new AbortController();
  let watchdog = 0;
  const alive = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => abort.abort(), SILENCE_MS);
  };
  alive();
  try {
    const response = await fetch("events", { signal: abort.signal, cache: "no-store" });
    if (!response.ok) return response.status;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return 0;
      alive();
      const events = (text + value).split("\n\n");
      text = events.pop();
      events.forEach(take);
    }
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof TypeError)) throw error;
    return 0;
  } finally {
    clearTimeout(watchdog);
  }
}

function take(event) {
  if (event.startsWith(":")) {
    setStatus("waiting", "Waiting for the engine: no new figures");
    return;
  }
  const fields = Object.fromEntries(event.split("\n").map((line) => line.split(/: (.*)/s)));
  if (!fields.data) return;
  failures = 0;
  if (fields.event === "hello") greet(JSON.parse(fields.data));
  if (fields.event === "snapshot") showSnapshot(JSON.parse(fields.data));
}

function explain(status, seconds) {
  byId("figures").setAttribute("aria-busy", "true");
  const when = latest ? ` Figures are from ${clock(latest.time)}.` : "";
  if (status === 401 || status === 403) {
    setStatus("lost", "The server asks for another API key; reload the page to give it");
  } else if (status === 503) {
    setStatus("lost", `Too many viewers; trying again every ${seconds} s.${when}`);
  } else if (status) {
    setStatus("lost", `The server answers with status ${status}; trying again every ${seconds} s.${when}`);
  } else {
    const gone = latest && latest.draining ? "The server has drained and stopped" : "Connection lost";
    setStatus("lost", `${gone}; trying again every ${seconds} s.${when}`);
  }
}

async function keepListening() {
  clearTimeout(retry);
  const status = await listen();
  abort = null;
  if (document.hidden) return; // a hidden page gives its place to others
  lostAt = lostAt ?? (latest ? Date.now() : null);
  failures += 1;
  const seconds = status === 503 ? 10 : Math.min(failures, 5);
  explain(status, seconds);
  if (status !== 401 && status !== 403) retry = setTimeout(keepListening, seconds * 1000);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && abort) abort.abort();
  if (!document.hidden && !abort) keepListening();
});

for (const chart of charts) chart.draw();
keepListening();
