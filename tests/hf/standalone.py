"""A program that uses an exported folder where nothing of this project can be imported; prints JSON.

python standalone.py FOLDER SCRATCH TEXT...
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

BLOCKED = ("megabyte_distill", "megatron", "mamba_ssm", "transformer_engine", "tests", "tools")


class Block:
    """An import finder in front of all others that has none of ``BLOCKED``."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}: blocked", name=name)


def use(folder: Path, scratch: Path, texts: list[str]) -> dict[str, Any]:
    """What a user does with the folder: load, score, generate in both ways, save, load again."""
    import torch
    import transformers

    torch.set_num_threads(1)

    def load(place: Path) -> tuple[Any, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        return model, transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=True)

    def generated(model: Any, tokenizer: Any) -> list[list[int]]:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        new = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
        rows: list[list[int]] = new[:, batch["input_ids"].shape[1] :].tolist()
        return rows

    model, tokenizer = load(folder)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    uncached = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
    beams = [
        model.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=False, use_cache=cached).tolist()
        for cached in (True, False)
    ]
    calls = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    first = generated(model, tokenizer)
    handle.remove()
    model.save_pretrained(scratch / "saved")
    tokenizer.save_pretrained(scratch / "saved")
    return {
        "version": transformers.__version__,
        "log_probabilities": model(**batch).logits.tolist(),
        "mask": batch["attention_mask"].tolist(),
        "generated": first,
        "columns_of_calls": calls,
        "uncached": uncached[:, batch["input_ids"].shape[1] :].tolist(),
        "beams": beams,
        "again": generated(*load(scratch / "saved")),
        "joint": [list(row.byte_ids) for row in model.generate_bytes(texts, max_new_bytes=8, temperature=0)],
        "decoded": tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
        "marker": tokenizer.decode(tokenizer.bos_token_id),
        "padding": tokenizer.padding_side,
        "files": sorted(path.name for path in (scratch / "saved").glob("*.py")),
        "imported": sorted({name.split(".")[0] for name in sys.modules} & set(BLOCKED)),
    }


if __name__ == "__main__":
    sys.meta_path.insert(0, Block)  # type: ignore[arg-type]
    warnings.simplefilter("ignore")
    print(json.dumps(use(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))
