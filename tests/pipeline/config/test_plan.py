"""What `pldr plan` says, against numbers known from the papers."""

import pytest

from pipeline.bundle.certificate.checks import make_checks
from pipeline.config.contraction import Expected, verdict
from pipeline.config.load import load_config
from pipeline.config.plan import duration, plan, plan_lines
from pipeline.config.post import PostConfig
from pipeline.config.schedule import (
    BUDGET_APPROXIMATE,
    BUDGET_INVARIANT,
    BUDGET_PUBLISHED,
    BUDGET_TABLE,
    MORE_BUDGET,
)
from pipeline.config.starter import Corpus, starter_yaml


def test_the_papers_110m_recipe(repository):
    config = load_config(repository / "configs" / "pldr-110m.yaml")
    report = plan(config)
    assert report["parameters"] == 109_689_362 == sum(report["parameters_by_part"].values())
    assert report["tokens"] == 250_000 * 32 * 1024
    assert report["invariance_budget"] == pytest.approx(13.7, abs=0.1)
    assert "invariant expected" in report["invariance_verdict"]
    assert report["hours"] == pytest.approx(
        report["flops_per_token_training"] * report["tokens"] / (8 * 989e12 * 0.4) / 3600
    )
    text = "\n".join(plan_lines(report))
    assert "109,689,362" in text and "zero3" in text


def test_the_sub_critical_recipe_is_warned_of(repository):
    config = load_config(repository / "configs" / "pldr-110m.yaml", ["train.max_lr=3e-5"])
    assert "NOT invariant" in plan(config)["invariance_verdict"]


def test_all_texts_about_budgets_say_the_same(repository):
    """What is predicted at a budget has its limits and its words in one place, and texts cite the table in docs/."""
    table = (repository / "docs" / "certificate.md").read_text().partition("## The invariance budget\n")[2]
    assert BUDGET_TABLE == 'docs/certificate.md, "The invariance budget"' and table
    low, middle, high = (f"{limit:g}" for limit in (BUDGET_APPROXIMATE, BUDGET_INVARIANT, BUDGET_PUBLISHED))
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:5] == [
        [f"| below {low}", "not invariant expected"],
        [f"| {low} to {middle}", "at best approximately invariant"],
        [f"| {middle} to {high}", "perhaps invariant"],
        [f"| {high} or more", "invariant expected"],
    ]
    for budget, (_, words) in zip((1.0, 4.1, 8.2, 13.0), rows[1:5], strict=True):
        said = verdict(Expected(budget, middle=1e-7, low=2e-8, high=1e-6))
        assert said.lower().startswith(words) and "order parameter of G 2e-08 to 1e-06 (9 of 10 runs)" in said
        assert (BUDGET_TABLE in said and MORE_BUDGET in said) is (budget < BUDGET_PUBLISHED)
    measures, post = {"not_finite": [], "losses": {}, "agreement": {}, "leak": {}, "greedy": {}}, PostConfig()
    for budget in (None, 1.0, 8.2, 13.0):
        checks = make_checks(
            {**measures, "relative_deviation_g": 0.1}, {}, post, variant="learned", num_prompts=100, budget=budget
        )
        fix = next(check.fix for check in checks if check.measure == "relative_deviation_g")
        assert BUDGET_TABLE in fix and ("should have been enough" in fix) is (budget == 13.0)
        assert (MORE_BUDGET in fix) is (budget != 13.0)
    yaml = starter_yaml("x", Corpus(["a"], 10**6, 1000, "a"), "tiny")
    assert f"{high} or more is enough: {BUDGET_TABLE}" in yaml


def test_the_budget_stops_where_g_is_frozen(repository):
    config = load_config(repository / "configs" / "pldr-110m.yaml", ["train.freeze_g={at_step: 4000}"])
    train, report = config.train, plan(config)
    # Warm-up from 0 over 2000 steps, then 2000 steps at (nearly) the highest rate.
    assert train.warmup_steps == 2000
    assert report["invariance_budget"] == pytest.approx(train.metric_decay * train.max_lr * 3000, rel=1e-3)
    assert "when G is frozen, at step 4,000: NOT invariant" in "\n".join(plan_lines(report))


def test_flops_and_activations_are_those_of_the_g_that_is_deduced(repository):
    file = repository / "configs" / "pldr-110m.yaml"
    own, batch, later = (
        plan(load_config(file, keys)) for keys in ([], ["train.g_from=batch"], ["train.share_g_below=1e-4"])
    )
    model = load_config(file).model
    shared = model.flops_per_token(training=True, sequences_per_g=4)
    assert own["flops_per_token_once_shared"] is None and own["flops_per_token_training"] > shared
    assert batch["flops_per_token_training"] == shared and batch["training_flops"] == shared * batch["tokens"]
    assert batch["activation_bytes_per_micro_batch"] < own["activation_bytes_per_micro_batch"]
    # When G is shared later is not known: the time is that of the steps before.
    assert later["flops_per_token_training"] == own["flops_per_token_training"] and later["hours"] == own["hours"]
    assert later["flops_per_token_once_shared"] == shared
    assert f"{shared:.4g} training once G is shared" in "\n".join(plan_lines(later))


def test_time_and_tokens_are_those_of_batches_that_grow(repository):
    """100 steps of 8 and 50 of 16 sequences before 32: what is left out in tokens is left out in hours."""
    file = repository / "configs" / "pldr-110m.yaml"
    warmup = "train.batch_warmup=[{batch: 8, steps: 100}, {batch: 16, steps: 50}]"
    plain, growing = (
        plan(load_config(file, ["train.steps=4000"])),
        plan(load_config(file, ["train.steps=4000", warmup])),
    )
    tokens = (100 * 8 + 50 * 16 + 3850 * 32) * 1024
    assert growing["tokens"] == tokens and growing["hours"] / plain["hours"] == pytest.approx(tokens / plain["tokens"])
    assert "(4,000 steps of up to 32,768)" in "\n".join(plan_lines(growing))
    assert "(4,000 steps of 32,768)" in "\n".join(plan_lines(plain))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0098, "less than a second"),
        (1.5, "about 1.5 seconds"),
        (240, "about 4 minutes"),
        (7300, "about 2 hours"),
        (1e7, "about 120 days"),
    ],
)
def test_a_duration_is_in_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text


def test_the_time_on_this_machine_comes_from_what_was_measured(repository):
    report = plan(load_config(repository / "configs" / "quickstart.yaml"), flops_here=1e10)
    assert report["assumed"] is None and report["hours"] == pytest.approx(report["training_flops"] / 1e10 / 3600)
    assert "minutes on this machine's CPU" in "\n".join(plan_lines(report))


def test_a_constant_g_has_no_budget(repository):
    config = load_config(repository / "configs" / "quickstart.yaml", ["model.g_source=identity"])
    report = plan(config)
    assert report["invariance_budget"] is None and report["parameters_by_part"]["metric_learner"] == 0


def test_a_plan_from_a_checkpoint_is_of_the_steps_left_and_of_the_budget_spent(repository):
    overrides = ["train.schedule=wsd", "train.steps=3750"]
    config = load_config(repository / "configs" / "ablations" / "base.yaml", overrides)
    whole = plan(config)
    begins = {"step": 3000, "budget": 7.0, "config": config.as_dict()}
    rest = plan(config, begins=begins)
    assert rest["steps"] == 750 and rest["tokens"] * 5 == whole["tokens"]
    assert rest["hours"] == pytest.approx(whole["hours"] / 5)
    assert rest["invariance_budget_before"] == 7.0
    decay = rest["invariance_budget"] - 7.0
    assert 0 < decay < whole["invariance_budget"] / 5
    text = "\n".join(plan_lines(rest))
    assert "(750 steps of 512 after step 3,000)" in text and "7.00 of it up to step 3,000" in text
