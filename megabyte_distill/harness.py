"""lm-evaluation-harness with byte-level students: its command line, with one more model.

    python -m megabyte_distill.harness --model megabyte --model_args path=RUN --tasks hellaswag --batch_size 32

The harness finds models of other packages only where they are imported, which this module does before it starts. Every
figure is the causal byte filter's, as under ``--model hf`` with an exported folder.
"""

from __future__ import annotations

import atexit
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__" and importlib.util.find_spec("lm_eval") is None:
    print("error: lm-evaluation-harness is not installed; pip install 'megabyte-distill[eval]'", file=sys.stderr)
    raise SystemExit(2)

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.evaluation.continuations import score_continuations
from megabyte_distill.inference.generation import GenerationMode, GenerationSettings, generate
from megabyte_distill.inference.prompts import prompt_bytes
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.student_folders import open_student

DEFAULT_BATCH = 32
"""Rows side by side where ``--batch_size auto`` is asked for."""

_READ = {"do_sample", "max_gen_toks", "min_p", "temperature", "top_k", "top_p", "until"}
"""Of a task's ``generation_kwargs``."""


@register_model("megabyte")
class MegabyteLM(TemplateLM):  # type: ignore[misc]
    """A student of a run, or of an exported folder, as the harness sees models.

    A context that several requests share (the answers of a question) is read once.
    """

    tokenizer_name = "utf-8"
    backend = "causal"

    def __init__(
        self,
        path: str,
        stage: str | None = None,
        paths: int = 4,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int = 8192,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        """Loads the student.

        Args:
            path: RUN, RUN/2a or an exported folder.
            stage: of a run (default: the last complete one).
            paths: bit histories of the filter.
            batch_size: rows side by side; "auto" takes 32.
            max_batch_size: the harness's; not needed.
            device: of an exported folder (default: a GPU where there is one). A run lies where it always does.
            max_length: bytes of context and answer; what is longer loses its beginning, as under ``--model hf``.
            max_gen_toks: bytes generated where a task does not say. Tasks count in tokens: give them more.
            seed: of sampled answers.

        Raises:
            ValueError: where the path is neither, the stage cannot speak, or a number is out of range.
        """
        super().__init__()
        automatic = isinstance(batch_size, str) and batch_size.startswith("auto")
        self.batch_size = DEFAULT_BATCH if automatic else int(batch_size)
        self._paths, self._seed = int(paths), int(seed)
        self.max_length, self.max_gen_toks = int(max_length), int(max_gen_toks)
        if min(self.batch_size, self._paths, self.max_length, self.max_gen_toks) < 1:
            raise ValueError("batch_size, paths, max_length and max_gen_toks: expected numbers of at least 1")
        opened = ExitStack()
        atexit.register(opened.close)
        self._student = opened.enter_context(open_student(Path(path), stage, device))
        if self._student.is_official:
            raise ValueError(f"{path}: official dechunk looks one byte ahead and is no causal byte model")

    @property
    def eot_token_id(self) -> int:
        """BOS, which ends a document as well."""
        return BOS_BYTE

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The bytes of a text; BOS is implied."""
        return list(prompt_bytes(string, "text"))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        # as many at a time as are sorted among themselves, so that a context's answers stay together
        span = 32 * self.batch_size
        answers: list[tuple[float, bool]] = []
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests")
        for first in range(0, len(pairs), span):
            part = pairs[first : first + span]
            found = score_continuations(self._student, part, paths=self._paths, batch=self.batch_size)
            answers += [(-one.nats, one.is_greedy) for one in found]
            bar.update(len(part))
        bar.close()
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[bytes, bytes]:
        """Both as bytes, the context without its beginning where it is too long."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"an answer of {len(continuation)} bytes; max_length is {self.max_length}: give a larger one"
            )
        text = [byte for place, byte in enumerate(context) if place or byte != BOS_BYTE]
        room = self.max_length + 1 - len(continuation)
        return bytes(text[max(0, len(text) - room) :]), bytes(continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats; those above ``max_length`` bytes in windows, as the harness cuts."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for index, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=BOS_BYTE, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            for context, continuation in map(make_disjoint_window, cut):
                owners.append(index)
                windows.append((None, context, continuation))
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop text; bytes that are no UTF-8 become U+FFFD."""
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(requests[i].args[0])))
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        done = 0
        while order:
            wanted = requests[order[0]].args[1]
            batch = [index for index in order[: self.batch_size] if requests[index].args[1] == wanted]
            order = order[len(batch) :]
            # a request that a task repeats must not be answered alike
            settings = self._settings(wanted, seed=self._seed + done)
            done += len(batch)
            room = self.max_length - settings.max_new_bytes
            prompts = [bytes(self.tok_encode(requests[index].args[0])) for index in batch]
            prompts = [prompt[max(0, len(prompt) - room) :] for prompt in prompts]
            for index, found in zip(batch, generate(self._student, prompts, settings), strict=True):
                answers[index] = found.byte_ids.decode("utf-8", errors="replace")
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
            bar.update(len(batch))
        bar.close()
        return answers

    def _settings(self, wanted: dict[str, Any], *, seed: int) -> GenerationSettings:
        """What a task's ``generation_kwargs`` ask for."""
        known = normalize_gen_kwargs(wanted, self.max_gen_toks)
        others = [f"{name}={value!r}" for name, value in sorted(known.items()) if name not in _READ]
        if others:  # no error: tasks name what other models alone know, and hours of other tasks may be behind
            warnings.warn(
                f"generation_kwargs: {', '.join(others)} left out, answers are drawn as if not given; the model "
                f"megabyte knows {', '.join(sorted(_READ))}",
                stacklevel=2,
            )
        size = int(known["max_gen_toks"])
        if size >= self.max_length:
            raise ValueError(f"max_gen_toks is {size}, max_length {self.max_length}: there is no room for the prompt")
        return GenerationSettings(
            max_new_bytes=size,
            sampling=Sampling(
                temperature=float(known["temperature"]),
                top_p=float(known.get("top_p", 1.0)),
                top_k=int(known.get("top_k", 0)),
                min_p=float(known.get("min_p", 0.0)),
            ),
            paths=self._paths,
            path_window=self.max_length,  # all of it, as transformers reads an export
            seed=seed,
            mode=GenerationMode.BYTES,
            stop=tuple(text.encode() for text in known["until"] if text),
        )


if __name__ == "__main__":
    cli_evaluate()
