#!/usr/bin/env python3
"""How much memory a conversion needs when the model grows: ours, and transformers' load and save beside it.

    python benchmarks/conversion.py                       # models of about 0.2 and 0.8 GB; writes about 3.5 GB, removed
    python benchmarks/conversion.py --quick               # about 30 and 100 MB, under a minute: shows that it runs
    python benchmarks/conversion.py --folder /scratch     # where the temporary files lie

Both models are random Llamas in bfloat16 with the same widths; the large one has more layers. Import, export and
transformers' from_pretrained + save_pretrained each run in a fresh process; a peak is the largest resident memory,
pages of mapped files included, less what the process needed once its modules were imported. The growth is the
difference of the two peaks over the difference of the two sizes: 0 where memory does not depend on the size, 1 where
the model is held once. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Nothing large is imported here: a process starts with the peak of the one that started it.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

UNIT = {"Linux": 1024, "Darwin": 1}
"""Bytes in which getrusage counts memory."""
WIDTHS = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
LAYERS = {"small": 9, "large": 36}
QUICK_WIDTHS = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
QUICK_LAYERS = {"small": 4, "large": 16}
TOKENIZER = ROOT / "examples" / "tiny" / "teacher"
STEPS = ("import", "export", "transformers")


def config_fields(widths: dict[str, int], layers: int) -> dict[str, Any]:
    """A Llama's config.json."""
    vocabulary = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    return {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", **widths, "num_hidden_layers": layers},
        **{"vocab_size": vocabulary, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False},
        **{"max_position_embeddings": 2048, "hidden_act": "silu", "dtype": "bfloat16"},
    }


def write_model(folder: Path, widths: dict[str, int], layers: int) -> None:
    """A random Hugging Face folder, written one tensor at a time."""
    import torch

    from megabyte_distill.conversion.families import family_of_config
    from megabyte_distill.conversion.hf_config import HfConfig
    from megabyte_distill.conversion.safetensors_folder import write_tensors

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_fields(widths, layers)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    fields = HfConfig.read(folder)
    family = family_of_config(fields)
    config = family.read_config(fields)
    shapes = family.table(config, config.vocab_size).theirs()
    layout = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    write_tensors(folder, layout, ((name, torch.randn(shape) * 0.02) for name, shape in shapes.items()))


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT.get(os.uname().sysname, 1024)


def convert(step: str, folder: Path) -> int:
    """Runs one step on ``folder``/hf and returns by how many bytes the peak rose above the imported modules."""
    if step == "transformers":
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        assert LlamaForCausalLM  # imported by name: transformers loads its modules when they are used
        before = peak_bytes()
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="auto", local_files_only=True)
        model.save_pretrained(folder / "transformers")
        return peak_bytes() - before
    from megabyte_distill.conversion.hf_export import export_teacher
    from megabyte_distill.conversion.hf_import import import_teacher
    from megabyte_distill.parallel.process_groups import world

    before = peak_bytes()
    with world():
        if step == "import":
            import_teacher(folder / "hf", folder / "megatron")
        else:
            export_teacher(folder / "megatron", folder / "exported")
    return peak_bytes() - before


def in_fresh_process(*arguments: str) -> str:
    """Runs this file with other arguments and returns the last line that it prints."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def measure(root: Path, *, quick: bool) -> dict[str, Any]:
    """Peaks and growths of all steps."""
    widths, layers = (QUICK_WIDTHS, QUICK_LAYERS) if quick else (WIDTHS, LAYERS)
    peaks: dict[str, dict[str, int]] = {step: {} for step in STEPS}
    sizes = {}
    in_fresh_process("--write", str(root), json.dumps(widths), json.dumps(layers))
    for name in layers:
        folder = root / name
        sizes[name] = (folder / "hf" / "model.safetensors").stat().st_size
        for step in STEPS:
            peaks[step][name] = int(in_fresh_process("--step", step, str(folder)))
            print(f"{step:<13} of {sizes[name] / 1e6:6.0f} MB: peak {peaks[step][name] / 1e6:6.0f} MB", flush=True)
        weights = [folder / made / "model.safetensors" for made in ("hf", "exported")]
        if not filecmp.cmp(*weights, shallow=False):
            raise SystemExit(f"{name}: the export differs from the model")
        shutil.rmtree(folder)
    growth = {
        f"{step}_peak_growth": (peaks[step]["large"] - peaks[step]["small"]) / (sizes["large"] - sizes["small"])
        for step in STEPS
    }
    in_mb = {f"{step}_peak_mb": {name: round(x / 1e6, 1) for name, x in peaks[step].items()} for step in STEPS}
    return {**growth, **in_mb, "model_mb": {name: round(size / 1e6, 1) for name, size in sizes.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--folder", type=Path, help="where the temporary files lie (default: the system's)")
    parser.add_argument("--write", nargs=3, metavar=("DIR", "WIDTHS", "LAYERS"), help=argparse.SUPPRESS)
    parser.add_argument("--step", nargs=2, metavar=("STEP", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        for name, layers in json.loads(args.write[2]).items():
            write_model(Path(args.write[0]) / name / "hf", json.loads(args.write[1]), layers)
    elif args.step:
        print(convert(args.step[0], Path(args.step[1])))
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as root:
            print(json.dumps(measure(Path(root), quick=args.quick)))


if __name__ == "__main__":
    main()
