"""The work of one forward pass, as XLA counts it before it optimises, against the matrix products that each family needs.

A multiplication of ``[m, k]`` with ``[k, n]`` is ``2 m k n`` operations. The formulas are written from the papers and the
shapes of Hugging Face's weights, not from our code. At the widths of real models everything else (norms, activations, softmax,
residuals) is below 2 %: more is wasted work, such as a projection computed twice, and less is work left out.
"""

import math

import jax
import jax.numpy as jnp
import pytest

from pefusion_jax.backbones import FAMILIES

BATCH, SEQ, LAYERS, WIDTH, HEADS, FFN, VOCAB, CLASSES = 2, 128, 2, 768, 12, 3072, 4096, 7
CHANNELS = 3
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=FFN,
    max_position_embeddings=SEQ + 2,
)
LABELS = {"id2label": {str(label): str(label) for label in range(CLASSES)}}
DECODER = TEXT | dict(num_key_value_heads=4)
CLIP_TEXT = dict(TEXT, hidden_size=512, num_attention_heads=8, intermediate_size=2048, max_position_embeddings=77)
IMAGE = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
CLIP_IMAGE = IMAGE | dict(image_size=224, patch_size=32)
PROJECTED = 512


def product(rows, inputs, outputs):
    return 2 * rows * inputs * outputs


def attention(queries, keys, width, inner, kv_inner=None):
    """Query and output projections of the queries, key and value projections of the keys, scores and weighted sum."""
    projections = 2 * product(queries, width, inner) + 2 * product(keys, width, kv_inner or inner)
    return projections + 2 * product(queries, keys, inner)


def feed_forward(tokens, width, hidden, matrices=2):
    return matrices * product(tokens, width, hidden)


def encoder(tokens, width=WIDTH, hidden=FFN, matrices=2):
    """Blocks of self-attention and feed-forward, over one row."""
    return LAYERS * (attention(tokens, tokens, width, width) + feed_forward(tokens, width, hidden, matrices))


def patches(size, width=WIDTH):
    """How many patches an image of 224 x 224 has, and the work of embedding them."""
    count = (224 // size) ** 2
    return count, product(count, CHANNELS * size * size, width)


def masked_lm():
    """A dense layer and the decoder, tied to the embeddings, on every token."""
    return encoder(SEQ) + product(SEQ, WIDTH, WIDTH) + product(SEQ, WIDTH, VOCAB)


def first_token_classifier():
    """A dense layer and a classifier on the first token."""
    return encoder(SEQ) + product(1, WIDTH, WIDTH) + product(1, WIDTH, CLASSES)


def decoder_only():
    """Grouped queries: a third as many keys and values as queries are projected, all queries attend; gated feed-forward."""
    blocks = LAYERS * (attention(SEQ, SEQ, WIDTH, WIDTH, WIDTH // 3) + feed_forward(SEQ, WIDTH, FFN, matrices=3))
    return blocks + product(SEQ, WIDTH, VOCAB)


def encoder_decoder(target=64, inner=8 * 64):
    """Fewer heads than the width has room for; the decoder has a block more and a cross-attention in each."""
    reads = LAYERS * (attention(SEQ, SEQ, WIDTH, inner) + feed_forward(SEQ, WIDTH, FFN, matrices=3))
    block = attention(target, target, WIDTH, inner) + attention(target, SEQ, WIDTH, inner)
    writes = (LAYERS + 1) * (block + feed_forward(target, WIDTH, FFN, matrices=3))
    return reads + writes + product(target, WIDTH, VOCAB)


def image_classifier(size, extra, heads, hidden=FFN, matrices=2, features=WIDTH):
    """Patches, a few tokens in front, blocks, one or two linear classifiers."""
    count, embed = patches(size)
    return embed + encoder(count + extra, WIDTH, hidden, matrices) + heads * product(1, features, CLASSES)


def clip_text():
    return encoder(77, 512, 2048)


def clip_image():
    count, embed = patches(32)
    return embed + encoder(count + 1)


def clip():
    """Both towers, their projections, and the similarity of each of two texts with each of two images."""
    projections = product(1, 512, PROJECTED) + product(1, WIDTH, PROJECTED)
    return clip_text() + clip_image() + projections + product(1, PROJECTED, BATCH)


def tokens(**lengths):
    return {name: jax.ShapeDtypeStruct((BATCH, length), jnp.int32) for name, length in lengths.items()}


def masked(length):
    return tokens(input_ids=length, attention_mask=length)


PIXELS = {"pixel_values": jax.ShapeDtypeStruct((BATCH, CHANNELS, 224, 224), jnp.float32)}
SWIGLU = (int(4 * WIDTH * 2 / 3) + 7) // 8 * 8
# model_type -> (architecture, the rest of its config.json, its inputs, operations for one row).
CASES = {
    "bert": ("BertForMaskedLM", TEXT, masked(SEQ), masked_lm()),
    "roberta": ("RobertaForSequenceClassification", TEXT | LABELS, masked(SEQ), first_token_classifier()),
    "mpnet": ("MPNetForMaskedLM", TEXT, masked(SEQ), masked_lm()),
    "llama": ("LlamaForCausalLM", DECODER, masked(SEQ), decoder_only()),
    "qwen2": ("Qwen2ForCausalLM", DECODER | dict(tie_word_embeddings=True), masked(SEQ), decoder_only()),
    "t5": (
        "T5ForConditionalGeneration",
        dict(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=64,
            d_ff=FFN,
            num_heads=8,
            num_layers=LAYERS,
            num_decoder_layers=LAYERS + 1,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        tokens(input_ids=SEQ, attention_mask=SEQ, decoder_input_ids=64),
        encoder_decoder(),
    ),
    "vit": ("ViTForImageClassification", IMAGE | LABELS, PIXELS, image_classifier(16, extra=1, heads=1)),
    "deit": (
        "DeiTForImageClassificationWithTeacher",
        IMAGE | LABELS,
        PIXELS,
        image_classifier(16, extra=2, heads=2),
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        {name: size for name, size in IMAGE.items() if name != "intermediate_size"} | LABELS | dict(patch_size=14),
        PIXELS,
        image_classifier(14, extra=1, heads=1, features=2 * WIDTH),
    ),
    "dinov2_with_registers": (
        "Dinov2WithRegistersForImageClassification",
        {name: size for name, size in IMAGE.items() if name != "intermediate_size"}
        | LABELS
        | dict(patch_size=14, num_register_tokens=4, use_swiglu_ffn=True),
        PIXELS,
        image_classifier(14, extra=5, heads=1, hidden=SWIGLU, matrices=3, features=2 * WIDTH),
    ),
    "clip": (
        "CLIPModel",
        dict(
            text_config=dict(CLIP_TEXT, model_type="clip_text_model"),
            vision_config=dict(CLIP_IMAGE, model_type="clip_vision_model"),
            projection_dim=PROJECTED,
        ),
        masked(77) | PIXELS,
        clip(),
    ),
    "clip_text_model": (
        "CLIPTextModelWithProjection",
        CLIP_TEXT | dict(projection_dim=PROJECTED),
        masked(77),
        clip_text() + product(1, 512, PROJECTED),
    ),
    "clip_vision_model": (
        "CLIPVisionModelWithProjection",
        CLIP_IMAGE | dict(projection_dim=PROJECTED),
        PIXELS,
        clip_image() + product(1, WIDTH, PROJECTED),
    ),
}


def test_every_family_has_a_formula():
    assert {name for family in FAMILIES for name in family.model_types} == set(CASES)


@pytest.mark.parametrize("model_type", CASES)
def test_the_work_is_that_of_the_formula(model_type):
    architecture, raw, inputs, row = CASES[model_type]
    family = next(family for family in FAMILIES if model_type in family.model_types)
    config = family.read_config({"model_type": model_type, "architectures": [architecture], **raw}, None)
    # A loop: the body of a scan would be counted once.
    model = family.build(config, dtype=jnp.float32, scan_layers=False, remat=False)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    counted = jax.jit(model.apply).lower(params, inputs).cost_analysis()["flops"]
    assert math.isfinite(counted) and BATCH * row <= counted <= 1.02 * BATCH * row, counted / (BATCH * row)
