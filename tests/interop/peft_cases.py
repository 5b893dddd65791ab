"""What the tests of PEFT adapters share: tiny bases, adapters that the real peft writes, and their outputs."""

import contextlib
import functools
import json
import pathlib
import tempfile
import warnings

import jax
import numpy as np
import peft
import torch
import transformers

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.interop import save_safetensors

ROOT = pathlib.Path(tempfile.mkdtemp(prefix="pefusion-peft-"))
IDS = np.array([[3, 4, 5, 6, 7], [7, 8, 9, 1, 2]], np.int32)
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
TEXT = {"vocab_size": 31, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {"image_size": 8, "patch_size": 4, **{name: TEXT[name] for name in TEXT if name != "vocab_size"}}


@contextlib.contextmanager
def quiet():
    """peft and transformers warn about their own affairs; what they say about keys is looked at where it matters."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def bert():
    config = transformers.BertConfig(max_position_embeddings=16, **TEXT)
    return transformers.BertModel(config), {"input_ids": IDS}


def bert_classifier():
    config = transformers.BertConfig(max_position_embeddings=16, num_labels=3, **TEXT)
    return transformers.BertForSequenceClassification(config), {"input_ids": IDS}


def roberta():
    config = transformers.RobertaConfig(max_position_embeddings=20, type_vocab_size=1, **TEXT)
    return transformers.RobertaModel(config), {"input_ids": IDS}


def mpnet():
    config = transformers.MPNetConfig(max_position_embeddings=20, **TEXT)
    return transformers.MPNetModel(config), {"input_ids": IDS}


def llama():
    config = transformers.LlamaConfig(num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=16, **TEXT)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS}


def qwen2():
    config = transformers.Qwen2Config(num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=16, **TEXT)
    return transformers.Qwen2ForCausalLM(config), {"input_ids": IDS}


def t5():
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS[:, ::-1].copy()}


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**VISION)), {"pixel_values": PIXELS}


def deit():
    return transformers.DeiTModel(transformers.DeiTConfig(**VISION)), {"pixel_values": PIXELS}


def dinov2():
    shape = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(use_swiglu_ffn=True, **shape)), {"pixel_values": PIXELS}


def clip():
    text = {**TEXT, "max_position_embeddings": 8, "eos_token_id": 30, "bos_token_id": 29, "pad_token_id": 28}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    return transformers.CLIPModel(config), {"input_ids": IDS, "pixel_values": PIXELS}


def clip_vision():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)), {"pixel_values": PIXELS}


FAMILIES = {
    make.__name__: make
    for make in (bert, bert_classifier, roberta, mpnet, llama, qwen2, t5, vit, deit, dinov2, clip, clip_vision)
}


class Base:
    """A tiny random model of transformers, and the same model here."""

    def __init__(self, name):
        with quiet():
            torch.manual_seed(len(name))
            hf, self.inputs = FAMILIES[name]()
            with torch.no_grad():
                for parameter in hf.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            self.folder, self.kind = ROOT / name, type(hf)
            hf.save_pretrained(self.folder)
        self.model, self.params = pf.load_pretrained(self.folder)
        self.scanned = pf.load_pretrained(self.folder, scan_layers=True)

    def hf(self):
        return self.kind.from_pretrained(self.folder).eval()

    def adapted(self, seed=0, model=None, dtype=None, **settings):
        """A peft model whose trainable parameters are all random."""
        torch.manual_seed(seed)
        made = peft.get_peft_model(model or self.hf(), peft.LoraConfig(init_lora_weights=False, **settings))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter + torch.randn_like(parameter) * 0.2)
                if dtype is not None and "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
        return made.eval()

    def theirs(self, model):
        with torch.no_grad():
            return outputs(model(**{name: torch.tensor(array) for name, array in self.inputs.items()}))

    def folded(self, adapted, adapters):
        """The outputs of the model with the adapters in its weights: compiled once for all adapters."""
        if not hasattr(self, "_compiled"):
            self._compiled = jax.jit(lambda p, i: self.model.apply({"params": p}, **i))
        return outputs(self._compiled(pf.fold(self.params, adapted.deltas(self.params, adapters)), self.inputs))

    def ours(self, adapted, adapters, params=None):
        return run(adapted, self.params if params is None else params, adapters, self.inputs)


@functools.cache
def base(name):
    return Base(name)


def outputs(out):
    """The hidden states and logits that every model has some of, as numpy arrays."""
    names = ("last_hidden_state", "logits", "logits_per_image", "image_embeds")
    found = [getattr(out, name, None) for name in names]
    return [np.asarray(array.detach() if isinstance(array, torch.Tensor) else array) for array in found if array is not None]


def run(adapted, params, adapters, inputs):
    return outputs(jax.jit(lambda p, a, i: adapted.apply(p, a, **i))(params, adapters, inputs))


def distance(ours, theirs):
    """The largest difference of outputs that both have, in units of their largest value if that is above 1."""
    by_shape = {array.shape: array for array in ours}
    shared = [(by_shape[array.shape], array) for array in theirs if array.shape in by_shape]
    assert shared, ([array.shape for array in ours], [array.shape for array in theirs])
    return max(float(np.abs(x.astype(np.float64) - y).max() / max(1.0, np.abs(y).max())) for x, y in shared)


def write(folder, config, tensors, name="adapter_model.safetensors"):
    """An adapter's folder made by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_safetensors(folder / name, tensors)
    return folder


def load_back(folder, home):
    """peft's own reading, which must not say anything about keys, with every B in use."""
    with quiet() as said:
        model = peft.PeftModel.from_pretrained(home.hf(), folder).eval()
    about_keys = [
        str(w.message) for w in said if any(word in str(w.message).lower() for word in ("key", "missing", "unexpected"))
    ]
    assert about_keys == []
    factors = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    assert factors and all(bool(p.any()) for p in factors)
    return model


def assert_same(ours, theirs, atol=0.0):
    """Two trees with the same leaves."""
    ours, theirs = trees.paths(ours), trees.paths(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, atol=atol, rtol=0, err_msg=path)
