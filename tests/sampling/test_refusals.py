"""What sampling refuses: one sentence, before anything is written."""

from __future__ import annotations

import pytest

import ditlab
from ditlab.errors import DitlabError
from ditlab.sampling.options import GuidanceFlags
from ditlab.sampling.sampler_choice import sampler_config
from ditlab.sampling.samples import sample_model
from ditlab.training.distributed import DistributedContext

SHORT = {"steps": 2, "seeds": "0-3"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": "3-1"}, "`seeds`: expected numbers and ranges such as 0-63 or 0-9,20,30-39, found '3-1'"),
        ({"seeds": "0-3,2"}, "`seeds`: expected each seed once, found 2 twice"),
        ({"seeds": "0-99999999999"}, "`seeds`: expected at most 10,000,000 images, found 100,000,000,000"),
        ({**SHORT, "strip": 5}, "`strip`: expected 0 to 4, the number of images, found 5"),
        ({"batch": 0}, "`batch`: expected at least 1, found 0"),
        ({"threads": 0}, "`threads`: expected at least 1, found 0"),
        ({**SHORT, "guidance": 2}, "guidance: expected a class-conditional denoiser, found an unconditional one"),
        ({**SHORT, "guidance": -1}, "guidance: expected a scale of at least 0 (1 is no guidance), found -1"),
        ({**SHORT, "guidance": "much"}, "`guidance`: expected numbers, found 'much'"),
        ({"steps": 1001}, "respacing '1001': expected at most 1000 steps in section 0, found 1001"),
        ({"sampler": "heun", "steps": 1001}, "respacing '1001': expected at most 1000 steps in section 0, found"),
        ({"sampler": "euler", "steps": "ddim9"}, "`sampler_steps`: the euler sampler takes a count, found 'ddim9'"),
        ({"schedule": "edm"}, "`schedule`: the ddpm sampler takes the denoiser's levels; expected none, found edm"),
        ({"step": 3}, "unknown setting of sample 'step'"),
        ({"steps": 3, "sampler_steps": 3}, "expected `steps` or `sampler_steps`, found both"),
        ({"classes": 1}, "`classes`: the model is unconditional; expected no classes"),
        ({**SHORT, "guidance_sweep": (2, 2)}, "`guidance_sweep`: expected different scales, at least 2, found 2,2"),
    ],
)
def test_bad_settings(refused, plain, settings, message):
    assert refused(plain, **settings).startswith(message)


def test_a_sampler_that_does_not_exist(plain):
    with pytest.raises(DitlabError, match=r"unknown sampler 'eular' \(nearest: euler"):
        sampler_config(plain, "eular")


def test_bad_settings_of_a_conditional_run(refused, conditional):
    sweep = {"steps": 2, "guidance_sweep": (1, 2)}
    assert "expected no `guidance.scale` beside it" in refused(conditional, **sweep, guidance=2)
    assert "expected `strip` or `guidance_sweep`, found both" in refused(conditional, **sweep, strip=1)
    assert "expected at most 16 seeds, found 17" in refused(conditional, **sweep, seeds="0-16")
    flags = GuidanceFlags(scale=2.0, channels=4)
    assert "expected channels of at most 3, found 4" in refused(conditional, **SHORT, guidance=flags)
    flags = GuidanceFlags(scale=2.0, interval=(2.0, 1.0))
    assert "expected an interval 0 <= low < high" in refused(conditional, **SHORT, guidance=flags)
    for number in (-1, 11):
        message = refused(conditional, **SHORT, classes=number)
        assert message == f"`classes`: expected classes 0..9 (or 10 for none), found {number}"


def test_places_that_cannot_be_written(refused, plain, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for name in ("file", "folder"):
        message = refused(plain, **SHORT, out=tmp_path / name)
        assert message == f"`out` {tmp_path / name}: expected a new folder or one of samples, found something else"
    assert "could not be written" in refused(plain, **SHORT, out=tmp_path / "file" / "inside")
    with pytest.raises(DitlabError, match="could not be written"):
        plain.sample(**SHORT).save(tmp_path / "file" / "inside")


def test_guidance_needs_an_estimate_without_a_class(refused, runs):
    """A network without that row, and one whose row was never trained."""
    never = runs.trained("never-dropped", num_classes=10, objective={"label_dropout": 0.0})
    none = runs.trained("no-null", num_classes=10, null_class=False, objective={"label_dropout": 0.0})
    settings = {"steps": 2, "seeds": "0-1", "guidance": 2}
    assert refused(never, **settings) == (
        "guidance: never-dropped was trained with objective.label_dropout 0, so it has no estimate without a class"
    )
    assert "so it has no estimate without a class" in refused(none, **settings)
    assert refused(none, steps=2, classes=10) == "`classes`: expected classes 0..9, found 10"


def test_images_that_are_not_finite(refused, conditional):
    """They would be black pictures; here of a guidance so strong that numbers overflow."""
    assert refused(conditional, seeds="3-5", steps=5, guidance=1e38) == (
        "samples: expected finite images, found NaN or infinite values in 3 of the 3 images of a batch, the first of "
        "them of seed 3; nothing of this batch was kept"
    )


def test_a_process_whose_rank_0_refuses_returns_nothing(tmp_path, monkeypatch):
    """A library call does not end the program of its caller."""
    model = ditlab.Model(ditlab.Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(3, 4, 4)), out=tmp_path / "mine")
    monkeypatch.setattr(DistributedContext, "raise_together", lambda self, error: False)
    assert sample_model(model, seeds=range(2), steps=2, out=tmp_path / "samples") is None
    assert not (tmp_path / "samples").exists()
