"""Case m: the gradient of every parameter, and six steps of the official optimiser."""

from dataclasses import replace

import pytest
import torch
from recompute import optimizer_config, pretraining_outputs, pretraining_task

from bridgetower.checkpoints.keymap import export_tensors
from bridgetower.training.optim import build_optimizer, parameter_groups, schedule
from golden import GRADIENTS, Tolerance, case, wrong

CASE = "m_gradients"
# Float32 noise in a gradient, measured as for the losses. Adam divides a gradient by its own size, noise included.
NOISE = 1e-7


@pytest.fixture(scope="module")
def recorded_figures(recorded):
    return recorded.json("gradients.json")


@pytest.fixture(scope="module")
def recorded_training(recorded):
    return recorded.json("train.json")


@pytest.fixture(scope="module")
def recomputed_gradients(recorded):
    return official_gradients(recorded)


@pytest.fixture(scope="module")
def retrained(recorded, recorded_training):
    return train(recorded, recorded_training)


def official_gradients(recorded, factor=1.0):
    model = recorded.fresh_model()
    outputs = pretraining_outputs(pretraining_task(recorded, model), recorded.inputs)
    (outputs["mlm_loss"] + factor * outputs["itm_loss"]).backward()
    return export_tensors(
        recorded.table(), {name: parameter.grad for name, parameter in model.named_parameters()}
    )


def gradient_figures(gradient):
    flat = gradient.double().flatten()
    ramp = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
    return {"norm": flat.norm().item(), "sum": flat.sum().item(), "probe": (flat @ ramp).item()}


def differing(gradients, expected):
    """Returns parameters with a figure that differs. Noise of `atol` in n entries is √n of it in sum and probe."""
    return {
        name
        for name, values in expected.items()
        if values is not None
        for figure, ours in gradient_figures(gradients[name]).items()
        if abs(ours - values[figure]) > tolerance(figure, gradients[name].numel(), values[figure])
    }


def tolerance(figure, entries, value):
    return GRADIENTS.atol * (1 if figure == "norm" else entries**0.5) + GRADIENTS.rtol * abs(value)


class TestGradients:
    def test_losses_and_every_parameter(self, recorded, recomputed_gradients, recorded_figures):
        """What the official model carries without using it is left behind or carried along."""
        task = pretraining_task(recorded, recorded.load())
        outputs = pretraining_outputs(task, recorded.inputs)
        ours = {name: outputs[name] for name in recorded.outputs}
        assert wrong(ours, recorded.outputs) == {}
        assert differing(recomputed_gradients, recorded_figures) == set()
        unreached = {name for name, values in recorded_figures.items() if values is None}
        assert set(recomputed_gradients) == set(recorded_figures) - unreached
        assert unreached <= {*recorded.checkpoint.dropped, *recorded.extra_tensor_names()}

    def test_control_another_weight_of_itm_fails(self, recorded, recorded_figures):
        names = differing(official_gradients(recorded, factor=1.01), recorded_figures)
        assert {"itm_score.fc.weight", "cross_modal_image_pooler.dense.weight"} <= names
        assert not any(name.startswith("mlm_score.") for name in names)

    def test_control_exchanged_query_and_value_fail(self, recomputed_gradients, recorded_figures):
        query = next(
            name for name in recorded_figures if name.endswith("attention.self.query.weight")
        )
        value = query.replace("query.weight", "value.weight")
        exchanged = recomputed_gradients | {
            query: recomputed_gradients[value],
            value: recomputed_gradients[query],
        }
        assert differing(exchanged, recorded_figures) == {query, value}


def train(recorded, training, **changes):
    """Runs the recorded steps on one batch and returns losses, learning rates by official name, and changes."""
    config = replace(optimizer_config(training["config"], training["max_steps"]), **changes)
    model = recorded.fresh_model()
    task = pretraining_task(recorded, model)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    factor = schedule(config, training["max_steps"])
    losses = []
    rates = []
    for step in training["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(step["step"])
        rates.append(
            {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
        )
        outputs = pretraining_outputs(task, recorded.inputs)
        optimizer.zero_grad()
        outputs["total_loss"].backward()
        optimizer.step()
        losses.append(
            {name: outputs[name].item() for name in ("mlm_loss", "itm_loss", "total_loss")}
        )
    before = recorded.checkpoint.tensors
    changes = {
        name: parameter.detach() - before[name] for name, parameter in model.named_parameters()
    }
    norms = {
        name: change.norm() for name, change in export_tensors(recorded.table(), changes).items()
    }
    return losses, rates, norms


def recorded_changes(training):
    (name,) = (name for name in training if name.startswith("param_delta_norm"))
    return {name: torch.tensor(norm) for name, norm in training[name].items()}


def differing_changes(norms, training, expected):
    """Returns parameters whose change over all steps has another norm, without those of pure noise."""
    changes = recorded_changes(training)
    return [
        name
        for name, norm in norms.items()
        if not is_noise(name, expected)
        and not Tolerance(5e-6, 1e-4 + NOISE / expected[name]["norm"]).holds(norm, changes[name])
    ]


def is_noise(name, expected):
    """A gradient that is zero but for rounding, as those of key biases are: Adam divides the noise by itself."""
    return expected[name]["norm"] < GRADIENTS.atol


class TestSteps:
    def test_losses_of_each_step(self, recorded_training, retrained):
        for ours, step in zip(retrained[0], recorded_training["steps"], strict=True):
            assert ours == pytest.approx({name: step[name] for name in ours}, rel=1e-5, abs=2e-5)

    def test_learning_rate_of_each_parameter_at_each_step(
        self, recorded, recorded_training, retrained
    ):
        groups = case("l_optimizer").json("groups_pretrain.json")["params"]
        table = recorded.table()
        for ours, step in zip(retrained[1], recorded_training["steps"], strict=True):
            for name, rate in ours.items():
                for official in table[name].names:
                    assert rate == pytest.approx(
                        step["group_lr_used"][groups[official][2]], rel=1e-6
                    )

    def test_change_of_each_parameter(self, recorded_training, retrained, recorded_figures):
        assert differing_changes(retrained[2], recorded_training, recorded_figures) == []
        assert sum(is_noise(name, recorded_figures) for name in retrained[2]) < 0.2 * len(
            retrained[2]
        )

        changes = recorded_changes(recorded_training)
        for name, norm in retrained[2].items():
            if is_noise(name, recorded_figures):  # moves less than a gradient does
                assert norm < changes[name.replace("key.bias", "query.bias")]
        assert all(changes[name] == 0 for name in set(changes) - set(retrained[2]))

    @pytest.mark.parametrize(
        "change", [{"rule": "adamw"}, {"betas": (0.9, 0.999)}, {"weight_decay": 0.0}]
    )
    def test_control_another_optimiser_fails(
        self, recorded, recorded_training, recorded_figures, change
    ):
        _, _, norms = train(recorded, recorded_training, **change)
        assert differing_changes(norms, recorded_training, recorded_figures) != []
