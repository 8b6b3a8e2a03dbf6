"""Checkpoints of a run: one tree and the records, written by orbax at once or not at all."""

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


class Store:
    """Saves and restores a run in a directory.

    Args:
      directory: of the run.
      identity: what must be equal for a run to go on.
    """

    def __init__(self, directory: str | pathlib.Path, identity: dict[str, Any]):
        self._directory = pathlib.Path(directory).absolute()
        self._identity = json.loads(json.dumps(identity))
        self._directory.mkdir(parents=True, exist_ok=True)

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._directory / "checkpoints", options=options)

    def save(self, rounds: int, state: Any, records: list[dict[str, Any]]) -> None:
        """Saves the state after ``rounds`` rounds, then the records where a reader finds them."""
        with self._manager() as manager:
            manager.save(
                rounds,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.tree.leaves(state)),
                    records=ocp.args.JsonSave({"records": records, "identity": self._identity}),
                ),
            )
        lines = "".join(json.dumps(r) + "\n" for r in records)
        temporary = self._directory / ".rounds.jsonl.tmp"
        temporary.write_text(lines)
        temporary.replace(self._directory / "rounds.jsonl")

    def restore(self, state: Any) -> tuple[Any, list[dict[str, Any]]]:
        """The newest saved state and its records; ``state`` and none if there is no checkpoint.

        Args:
          state: a new one, for structure, shapes and dtypes.

        Raises:
          ValueError: if the directory holds another run.
        """
        with self._manager() as manager:
            newest = manager.latest_step()
            if newest is None:
                return state, []
            found = manager.restore(newest, args=ocp.args.Composite(records=ocp.args.JsonRestore()))
            saved = found["records"]
            different = [k for k, v in self._identity.items() if saved["identity"].get(k) != v]
            if different:
                k = different[0]
                raise ValueError(
                    f"{self._directory} holds a run with another {k}: {saved['identity'].get(k)}, not {self._identity[k]}; choose "
                    "another directory."
                )
            leaves, structure = jax.tree.flatten(state)
            abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
            got = manager.restore(
                newest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
        return jax.tree.unflatten(structure, got["state"]), saved["records"]
