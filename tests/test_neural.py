import pytest
import torch
from contracts import RuleContract
from torch import nn

from convexlearn.errors import OptionError
from convexlearn.networks import ImageNetwork, initialise, mlp
from convexlearn.rules.base import Role
from convexlearn.rules.neural import NeuralRule


class TestNeuralRule(RuleContract):
    @pytest.fixture
    def rule(self):
        return NeuralRule(mlp(3, 4, hidden=(8,), seed=0), shape=(2, 2)).double()

    @pytest.fixture
    def context(self):
        return torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


class TestImageRule(RuleContract):
    @pytest.fixture
    def rule(self):
        return NeuralRule(ImageNetwork(upsample=2, width=4, seed=0)).double()

    @pytest.fixture
    def context(self):
        return torch.linspace(-1, 1, 108, dtype=torch.float64).reshape(3, 6, 6).sin()


def test_mlp_equals_the_formula():
    network, x = mlp(2, 1, hidden=(3,), seed=0).double(), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    first, _, last = network
    torch.testing.assert_close(network(x), torch.relu(x @ first.weight.mT) @ last.weight.mT)
    assert not first.bias.any()


def test_the_activation_is_a_choice():
    network, x = mlp(2, 1, hidden=(3,), activation=nn.SiLU, seed=0), torch.tensor([[1.0, -2.0]])
    hidden = x @ network[0].weight.mT
    torch.testing.assert_close(network(x), (hidden * hidden.sigmoid()) @ network[2].weight.mT)


def test_weights_depend_on_the_seed_only():
    before = torch.get_rng_state()
    a, b, c = (mlp(3, 2, seed=seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    ImageNetwork(seed=torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())


def test_initialisation_has_variance_two_over_fan_in():
    layer = initialise(nn.Linear(400, 400), 0)
    assert layer.weight.var().item() == pytest.approx(2 / 400, rel=0.02)


@pytest.mark.parametrize(("size", "shape"), [((8, 8), (24, 24)), ((1, 5, 7), (1, 15, 21))])
def test_untrained_image_network_interpolates(size, shape):
    x = torch.linspace(0, 1, 2 * torch.Size(size).numel(), dtype=torch.float64).reshape(2, *size).cos()
    s = ImageNetwork(upsample=3).double()(x)
    images = x if x.ndim == 4 else x.unsqueeze(1)
    expected = nn.functional.interpolate(images, scale_factor=3.0, mode="bicubic", align_corners=False)
    assert s.shape == (2, *shape)
    torch.testing.assert_close(s, expected.reshape(s.shape), rtol=0, atol=1e-14)


def test_role_and_dtype():
    rule = NeuralRule(mlp(3, 2, hidden=(4,)))
    assert rule.count_parameters() == {Role.OBJECTIVE: 0, Role.HYPER: 0, Role.NETWORK: 26}
    assert rule(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(TypeError, match=r"network must be an nn\.Module"):
        NeuralRule(torch.relu)
    with pytest.raises(OptionError, match="at least 1"):
        ImageNetwork(depth=0)
