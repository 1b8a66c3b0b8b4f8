"""One pretraining batch for both libraries, and what Transformers' torch ELECTRA makes of it.

python -m tests.models.parity     writes tests/fixtures/transformers_electra.npz anew (needs torch and transformers)
"""

import pathlib

import jax
import numpy as np

from electrax.models.encoder import EncoderConfig
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from tests.fixtures.weights import random_params

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "transformers_electra.npz"
VOCABULARY, EMBEDDING, LAYERS, LENGTH = 40, 12, 2, 10
DISCRIMINATOR, GENERATOR = {"width": 16, "heads": 2, "feed_forward": 32}, {"width": 8, "heads": 2, "feed_forward": 16}
PAD, CLS, SEP, MASK = 0, 1, 2, 3

IDS = np.array(
    [
        [CLS, 10, 11, 12, SEP, 13, 14, 15, 16, SEP],
        [CLS, 20, 21, SEP, 22, 23, SEP, PAD, PAD, PAD],
        [CLS, 30, 31, 33, 33, SEP, PAD, PAD, PAD, PAD],
    ],
    np.int32,
)
# the first 33 is masked, and 33 is what the generator guesses there: a sample that is right
TYPES = np.array([[0] * 5 + [1] * 5, [0] * 4 + [1] * 3 + [0] * 3, [0] * 10])
SLOTS = np.array([[8, 2, 5], [4, 1, 0], [3, 0, 0]], np.int32)
USED = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
HIDDEN = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)  # the third slot of the first row is kept as it is


def tower(**shape) -> EncoderConfig:
    common = {"vocab_size": VOCABULARY, "layers": LAYERS, "embedding_width": EMBEDDING, "max_length": LENGTH}
    return EncoderConfig(**common, **shape, dropout=0.0, attention_dropout=0.0)


def make_task() -> PretrainTask:
    """Without dropout, and with the arg max for a sample, nothing is left to chance."""
    objective = ObjectiveConfig(temperature=0.0)
    return PretrainTask(
        objective, tower(**DISCRIMINATOR), tower(**GENERATOR), SpecialIds(PAD, CLS, SEP, MASK), layout="segments"
    )


def make_params():
    shapes = jax.eval_shape(lambda: make_task().init(jax.random.key(0), {"ids": IDS}))
    return random_params(shapes, seed=12)


def masked_ids() -> np.ndarray:
    masked = IDS.copy()
    for row, slot in zip(*np.nonzero(HIDDEN), strict=True):
        masked[row, SLOTS[row, slot]] = MASK
    return masked


def prepared_batch() -> dict:
    """What PretrainTask.prepare would give, with the masked positions fixed."""
    real = IDS != PAD
    return {
        "ids": IDS,
        "masked": masked_ids(),
        "slots": SLOTS,
        "used": USED,
        "hidden": HIDDEN,
        "slot_weight": (USED / USED.sum()).astype(np.float32),
        "token_weight": (real / real.sum()).astype(np.float32),
        "sample_key": jax.random.split(jax.random.key(0), 3),
        "dropout_seed": np.zeros((3, 2), np.uint32),
    }


def flatten(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def transformers_state(params: dict, name: str) -> dict:
    """Torch tensors by electrax's path -> the state of one of Transformers' models, differentiably.

    A Linear of torch has its kernel as [out, in]; qkv kernels are [D, H, 3, K] here, output kernels [H, K, D].
    """
    state = {}

    def dense(target, source):
        kernel, bias = params[f"{source}/kernel"], params[f"{source}/bias"]
        state[f"{target}.weight"] = kernel.reshape(-1, bias.shape[0]).T
        state[f"{target}.bias"] = bias

    def norm(target, source):
        state[f"{target}.weight"], state[f"{target}.bias"] = params[f"{source}/scale"], params[f"{source}/bias"]

    embeddings = "electra.embeddings"
    word = params["embeddings/word"][:VOCABULARY]
    state[f"{embeddings}.word_embeddings.weight"] = word
    state[f"{embeddings}.position_embeddings.weight"] = params["embeddings/position"]
    state[f"{embeddings}.token_type_embeddings.weight"] = params["embeddings/type"]
    norm(f"{embeddings}.LayerNorm", "embeddings/norm")
    dense("electra.embeddings_project", f"{name}/encoder/embeddings_project")
    for i in range(LAYERS):
        target, source = f"electra.encoder.layer.{i}", f"{name}/encoder/layer_{i}"
        kernel, bias = params[f"{source}/attention/qkv/kernel"], params[f"{source}/attention/qkv/bias"]
        for j, part in enumerate(("query", "key", "value")):
            state[f"{target}.attention.self.{part}.weight"] = kernel[:, :, j].reshape(kernel.shape[0], -1).T
            state[f"{target}.attention.self.{part}.bias"] = bias[:, j].reshape(-1)
        dense(f"{target}.attention.output.dense", f"{source}/attention/output")
        norm(f"{target}.attention.output.LayerNorm", f"{source}/attention_norm")
        dense(f"{target}.intermediate.dense", f"{source}/up")
        dense(f"{target}.output.dense", f"{source}/down")
        norm(f"{target}.output.LayerNorm", f"{source}/output_norm")
    dense(f"{name}_predictions.dense", f"{name}/head/dense")
    if name == "generator":
        norm("generator_predictions.LayerNorm", "generator/head/norm")
        state["generator_lm_head.weight"] = word
        state["generator_lm_head.bias"] = params["generator/head/output_bias"][:VOCABULARY]
    else:
        dense("discriminator_predictions.dense_prediction", "discriminator/head/output")
    return state


def transformers_outputs() -> dict[str, np.ndarray]:
    """Logits, losses, the corrupted rows and every gradient, in electrax's layout, of Transformers' models."""
    import torch
    from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

    def build(model, shape):
        config = ElectraConfig(
            vocab_size=VOCABULARY,
            embedding_size=EMBEDDING,
            hidden_size=shape["width"],
            num_hidden_layers=LAYERS,
            num_attention_heads=shape["heads"],
            intermediate_size=shape["feed_forward"],
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,  # else torch would withhold the padding row's gradient
            attn_implementation="eager",
        )
        return model(config).eval()

    params = {path: torch.tensor(np.asarray(leaf), requires_grad=True) for path, leaf in flatten(make_params()).items()}

    def call(model, name, ids, labels):
        state = transformers_state(params, name)
        if missing := {key for key, _ in model.named_parameters()} - state.keys():
            raise KeyError(f"parameters without a counterpart: {missing}")
        inputs = {"input_ids": ids, "attention_mask": IDS != PAD, "token_type_ids": TYPES, "labels": labels}
        inputs = {key: torch.tensor(np.asarray(value, np.int64)) for key, value in inputs.items()}
        return torch.func.functional_call(model, state, (), inputs)

    rows = np.arange(len(IDS))[:, None]
    labels = np.full_like(IDS, -100)
    labels[rows.repeat(3, 1)[USED], SLOTS[USED]] = IDS[rows.repeat(3, 1)[USED], SLOTS[USED]]
    generator = call(build(ElectraForMaskedLM, GENERATOR), "generator", masked_ids(), labels)
    logits = generator.logits.detach().numpy()[rows, SLOTS]
    corrupted = IDS.copy()
    corrupted[rows.repeat(3, 1)[USED], SLOTS[USED]] = logits.argmax(-1)[USED]
    replaced = corrupted != IDS
    discriminator = call(build(ElectraForPreTraining, DISCRIMINATOR), "discriminator", corrupted, replaced)
    loss = generator.loss + 50.0 * discriminator.loss
    loss.backward()
    return {
        "generator_logits": logits,
        "discriminator_logits": discriminator.logits.detach().numpy(),
        "corrupted": corrupted,
        "mlm_loss": generator.loss.detach().numpy(),
        "rtd_loss": discriminator.loss.detach().numpy(),
        "loss": loss.detach().numpy(),
        **{f"gradient/{path}": leaf.grad.numpy() for path, leaf in params.items()},
    }


if __name__ == "__main__":
    np.savez_compressed(FIXTURE, **transformers_outputs())
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes")
