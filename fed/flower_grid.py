"""Flower's grid, with patience: work of a node that died goes to the one that takes its place."""

import time
from collections.abc import Callable, Iterable
from typing import Any

try:
    from flwr.app import Message, RecordDict
except ImportError as error:
    raise ImportError(
        "fed.flower needs flwr and it isn't installed: pip install 'jaxmoe[flower]', in an environment of its own."
    ) from error


class PatientGrid:
    """A ``Grid`` that knows which client a node is, and gives a node's unfinished work to the one that takes its place.

    Args:
      grid: Flower's ``Grid``, or what has its methods.
      nodes: client -> node; changed in place.
      clients: that are to come.
      poll_s: between looks.
      concurrency: clients that work at the same time at most; 0: all. For nodes that share a machine.
      retries: how often work that came back as an error is sent to the same node again.
      on_event: called with (name, details) of what happens.
    """

    def __init__(
        self,
        grid: Any,
        nodes: dict[int, int],
        clients: Iterable[int],
        *,
        poll_s: float = 0.5,
        concurrency: int = 0,
        retries: int = 2,
        on_event: Callable[..., None] = lambda name, **details: None,
    ):
        self._grid, self.nodes, self._clients = grid, nodes, set(clients)
        self._poll_s, self._retries, self._on_event = poll_s, retries, on_event
        self._concurrency = concurrency
        self._asked: dict[str, int] = {}  # who-messages in flight, to which node
        self._seen: set[int] = set()

    def wait_for_nodes(self, timeout_s: float) -> None:
        """Until every client has a node.

        Raises:
          TimeoutError: naming the clients that have none.
        """
        end = time.monotonic() + timeout_s
        while self._clients - set(self.nodes):
            if time.monotonic() > end:
                missing = sorted(self._clients - set(self.nodes))
                raise TimeoutError(
                    f"clients {missing} have no node after {timeout_s:g} s; start a SuperNode with --node-config client=K for each."
                )
            self._meet()
            time.sleep(self._poll_s)

    def _meet(self) -> list[int]:
        """Asks new nodes who they are; clients that have got another node."""
        for node in self._grid.get_node_ids():
            if self._concurrency and len(self._asked) >= self._concurrency:
                break
            if node not in self._seen:
                self._seen.add(node)
                question = Message(RecordDict(), node, "query.who")
                for number in self._grid.push_messages([question]):
                    self._asked[number] = node
        changed = []
        for answer in self._grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(answer.metadata.reply_to_message_id)
            try:
                client = None if answer.has_error() else int(answer.content["config"]["client"])
            except (KeyError, TypeError, ValueError):
                client = None
            if client is None:  # it died while it was asked, or is to be asked again
                self._seen.discard(node)
                self._on_event("unknown", node=str(node))
                continue
            self.nodes[client] = node
            changed.append(client)
            self._on_event("node", client=client, node=str(node))
        return changed

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to all messages, or to those that were answered before ``timeout`` seconds; errors only where trying again did not help."""
        work = {int(m.content["config"]["client"]): m for m in messages}
        left = dict.fromkeys(work, self._retries)
        waiting, flight = list(work), {}
        done: dict[int, Message] = {}
        end = None if timeout is None else time.monotonic() + timeout
        while set(work) - set(done):
            if end is not None and time.monotonic() > end:
                break
            while waiting and (not self._concurrency or len(flight) < self._concurrency):
                client = waiting.pop(0)
                flight[self._push(work[client])] = client
            again = []
            for reply in self._grid.pull_messages(list(flight)) if flight else ():
                client = flight.pop(reply.metadata.reply_to_message_id)
                failed = reply.has_error()
                self._note("error" if failed else "reply", work[client])
                if failed and left[client]:
                    left[client] -= 1
                    again.append(client)
                else:
                    done.setdefault(client, reply)
            for client in self._meet():
                if client in waiting:
                    work[client] = _to(self.nodes[client], work[client])
                elif client in work and client not in done:  # its node had it and is gone
                    again.append(client)
            for client in dict.fromkeys(again):
                flight = {number: k for number, k in flight.items() if k != client}
                waiting.insert(0, client)
                work[client] = _to(self.nodes[client], work[client])
                self._note("again", work[client])
            time.sleep(self._poll_s)
        return list(done.values())

    def _push(self, message: Message) -> str:
        (number,) = self._grid.push_messages([message])
        self._note("asked", message)
        return number

    def _note(self, name: str, message: Message) -> None:
        client = int(message.content["config"]["client"])
        self._on_event(name, client=client, round=message.metadata.group_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


def _to(node: int, message: Message) -> Message:
    """The same content as a message of its own."""
    meta = message.metadata
    return Message(message.content, node, meta.message_type, group_id=meta.group_id)
