"""What must not change the result: packing, padding, the cache; and the shapes of the published models."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from mixmodal.models.presets import PRESETS
from mixmodal.models.transformer import Transformer, TransformerConfig, load_weights, save_weights
from mixmodal.weights import save_tensors

ROOT = Path(__file__).parents[2]
TINY = TransformerConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, max_seq_len=32)
LEARNED = replace(TINY, norm="layernorm", activation="gelu", position="learned", qk_norm=False, tie_embeddings=True)
VARIANTS = {"chameleon_7b": TINY, "chameleon_34b": replace(TINY, norm_placement="post_sublayer"), "cm3leon": LEARNED}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def network(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(request.param, init_std=0.2)).eval()


@torch.no_grad()
def test_a_packed_document_sees_nothing_of_its_neighbours(network: Transformer) -> None:
    first, second = torch.randint(50, (1, 7)), torch.randint(50, (1, 9))
    packed = network(
        torch.cat((first, second), 1),
        positions=torch.cat((torch.arange(7), torch.arange(9)))[None],
        segment_ids=torch.tensor([[1] * 7 + [2] * 9]),
    )
    alone = torch.cat((network(first), network(second)), 1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)  # worst seen 2e-6


@torch.no_grad()
def test_cached_logits_equal_uncached(network: Transformer) -> None:
    tokens = torch.randint(50, (3, 12))
    cache = network.build_cache(3, 12)
    steps = [network(tokens[:, :5], cache=cache)] + [network(tokens[:, t : t + 1], cache=cache) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), network(tokens), atol=2e-5, rtol=1e-5)  # worst seen 2e-6


@torch.no_grad()
def test_unequal_prompts_in_one_cache_equal_each_alone(network: Transformer) -> None:
    lengths, tokens = [3, 6], torch.randint(50, (2, 10))
    cache = network.build_cache(2, 12)
    network(tokens[:, :6], cache=cache)  # the first row's last three tokens are padding
    for step in range(4):
        at = torch.tensor(lengths) + step
        new = tokens[torch.arange(2), at][:, None]
        logits = network(new, positions=at[:, None], cache=cache)
        for row in range(2):
            alone = network(tokens[row : row + 1, : at[row] + 1])[:, -1]
            torch.testing.assert_close(logits[row], alone, atol=2e-5, rtol=1e-5)  # worst seen 1e-6


@torch.no_grad()
def test_a_repeated_prefix_continues_as_if_computed_again(network: Transformer) -> None:
    prefix, suffixes = torch.randint(50, (1, 4)), torch.randint(50, (3, 5))
    cache = network.build_cache(1, 9)
    network(prefix, cache=cache)
    found = network(suffixes, cache=cache.select(torch.zeros(3, dtype=torch.long)))
    whole = network(torch.cat((prefix.expand(3, -1), suffixes), 1))
    torch.testing.assert_close(found, whole[:, 4:], atol=2e-5, rtol=1e-5)  # worst seen 2e-6


@torch.no_grad()
def test_a_stretch_of_columns_equals_the_same_columns_of_all(network: Transformer) -> None:
    hidden = network.hidden(torch.randint(50, (2, 6)))
    torch.testing.assert_close(network.logits(hidden, slice(10, 20)), network.logits(hidden)[..., 10:20])


def test_a_full_cache_says_so() -> None:
    network = Transformer(TINY)
    with pytest.raises(ValueError, match="the cache holds 4 tokens a row; 5 are needed"):
        network(torch.zeros(1, 5, dtype=torch.long), cache=network.build_cache(1, 4))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network, tokens = Transformer(replace(TINY, dropout=0.5)), torch.zeros(1, 4, dtype=torch.long)
    assert not torch.equal(network(tokens), network(tokens))
    network.eval()
    assert torch.equal(network(tokens), network(tokens))


def test_output_layers_can_start_at_zero() -> None:
    network = Transformer(replace(LEARNED, zero_init_output=True))
    for block in network.blocks:
        assert not block.ffn.out.weight.any()
        assert not block.attention.out.weight.any()
    assert network.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "cm3leon_350m": 372_775_936,
        "cm3leon_760m": 785_656_320,
        "cm3leon_7b": 6_725_595_136,
        "chameleon_7b": 7_013_666_816,
        "chameleon_34b": 34_294_308_864,
    }.items(),
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = Transformer(PRESETS[name])
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    published = {"350m": 0.35e9, "760m": 0.76e9, "cm3leon_7b": 7e9, "chameleon_7b": 7.01e9, "34b": 34.29e9}
    nearest = next(size for key, size in published.items() if name.endswith(key))
    assert parameters == pytest.approx(nearest, rel=0.07)


@pytest.mark.parametrize("name", PRESETS)
def test_config_file_says_what_the_preset_says(name: str) -> None:
    stored = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    assert asdict(TransformerConfig(**stored)) == asdict(PRESETS[name])


def test_weights_round_trip_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    network, other = Transformer(TINY), Transformer(TINY)
    save_weights(network, tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(ValueError, match=r"tensor blocks.1.attention.k_norm.bias is unknown to the model"):
        load_weights(Transformer(replace(TINY, num_layers=1)), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor embedding.weight has shape \(50, 32\), not \(51, 32\)"):
        load_weights(Transformer(replace(TINY, vocab_size=51)), tmp_path / "model.safetensors")
    integers = {name: tensor.int() for name, tensor in network.state_dict().items()}
    save_tensors(integers, tmp_path / "integers.safetensors")
    with pytest.raises(ValueError, match=r"integers\.safetensors: tensor embedding\.weight is of torch\.int32"):
        load_weights(other, tmp_path / "integers.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(other, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(other, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "dim 32 does not divide into num_heads 5"),
        ({"num_kv_heads": 3}, "num_heads 4 is no multiple of num_kv_heads 3"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"num_layers": -1}, "num_layers is -1; it must be at least 1"),
        ({"vocab_size": -4}, "vocab_size is -4; it must be at least 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"init_std": -1.0}, "init_std is -1"),
        ({"rope_theta": 0.0}, "rope_theta is 0"),
        ({"head_dim": 7}, "even head_dim, not 7"),
        ({"position": "learned", "rope_theta": 5e5}, "rope_theta can not act where position is learned"),
        ({"position_init_std": 0.1}, "position_init_std can not act where position is rope"),
    ],
)
def test_impossible_shapes_name_the_key(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_a_vocabulary_must_be_known_to_build() -> None:
    with pytest.raises(ValueError, match="vocab_size is 0"):
        Transformer(TransformerConfig())
