"""Sections of a report that say what was found, and whether it would be found again: labels, models, seeds, powers."""

import numpy as np

from ltm_pyro.analysis.fast_steps import climbing
from ltm_pyro.analysis.global_posterior import global_posteriors
from ltm_pyro.analysis.model_comparison import rank
from ltm_pyro.analysis.pictures.evidence import plot_ranking
from ltm_pyro.analysis.pictures.thoughts import (
    classes_of,
    plot_agreement,
    plot_by_thought,
    plot_fast_steps,
    plot_global,
    principal_plane,
)
from ltm_pyro.analysis.posterior import THOUGHTS
from ltm_pyro.analysis.probes import (
    Probe,
    numeric_labels,
    probable_labels,
    probe,
    probe_thoughts,
    regress,
    shuffled_probe,
)
from ltm_pyro.analysis.section import Point, ReportInputs, Section, Table
from ltm_pyro.analysis.sensitivity import power_scaling
from ltm_pyro.analysis.stability import agreement, nearest_rows
from ltm_pyro.data.documents import Label
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.utils.plotting import CYCLE

MOST_POINTS = 1000  # on the map, as many as there are entries of sequences
FOUND = 0.05  # of what is found among all thoughts
FAR = 1.0  # sd of q: a shift that is larger than what is uncertain


def fast_steps(inputs: ReportInputs) -> Section:
    """The ELBO over the fast steps of every text."""
    found = climbing(inputs.posterior)
    still = np.flatnonzero(found["is_climbing"].values)
    size, steps = inputs.posterior.size, inputs.posterior.stats.sizes["step"]
    verdict = f"After {steps} fast steps no sequence's ELBO is still climbing beyond its noise."
    if len(still):
        largest = float(found["gain"].max())
        verdict = (
            f"After {steps} fast steps the ELBO of {len(still)} of {size} sequences is still climbing, by up to "
            f"{largest:.2f} nats over the last quarter: give more --fast-steps."
        )
    return Section(verdict, (plot_fast_steps(inputs.posterior, still),), good=not len(still))


def map_of_texts(inputs: ReportInputs) -> Section:
    """The means of q on two principal components, with a name for each text."""
    posterior = inputs.posterior
    known = [*probable_labels(posterior), *(x for x in posterior.labels if x != "document")]
    label = known[0] if known else None
    values, names = classes_of(posterior.labels[label] if label else [None] * posterior.size)
    colors = dict(zip(names, CYCLE, strict=False))
    (plane, (first, second)), texts = principal_plane(posterior), posterior.texts
    points = []
    for n in range(min(posterior.size, MOST_POINTS)):
        kind = str(values[n])
        name = " · ".join(x for x in (str(n), kind, texts[n][:120]) if x)
        x, y = plane[n].tolist()
        points.append(Point(n, x, y, kind or "(missing)", colors[kind], name))
    verdict = (
        f"The means of q on their first two principal components ({first:.0%} and {second:.0%} of the variance)"
        f"{f', coloured by {label!r}' if label else ''}. The pointer shows a text, a click goes to it."
    )
    return Section(verdict, points=tuple(points))


def global_latents(inputs: ReportInputs) -> Section:
    """What the corpus says of the prior's global latent variables."""
    found = global_posteriors(inputs.need_run().model)
    pictures, rows, verdicts = [], [], []
    for x in found:
        low, median, high = x.interval_3N
        prior = np.median(x.prior_SN, axis=0)
        apart = int(((low > prior) | (high < prior)).sum())
        verdicts.append(
            f"Of {median.size} components of '{x.name}' the 90 % interval of {apart} leaves out the prior's median; "
            f"their posterior is narrower than the prior by {x.shrinkage_N.mean():.0%} on average."
        )
        rows.append(
            (
                x.name,
                str(median.size),
                f"{x.kl:.1f}",
                f"{np.median(prior):.3g}",
                f"{median.min():.3g} to {median.max():.3g}",
                f"{x.shrinkage_N.min():.2f} to {x.shrinkage_N.max():.2f}",
            )
        )
        pictures.append(plot_global(x))
    head = ("variable", "components", "KL (nats per corpus)", "prior median", "medians of q", "shrinkage")
    return Section(" ".join(verdicts), tuple(pictures), (Table(head, rows),))


def labels(inputs: ReportInputs) -> Section:
    """Linear probes of every label that has enough documents: classes, numbers, and each thought alone."""
    posterior = inputs.posterior
    names, numbers = probable_labels(posterior), numeric_labels(posterior)
    if not names and not numbers:
        raise UsageError("No label has two classes of five documents, or numbers of ten: add labels to the JSONL.")
    tables, pictures, verdicts = [], [], []
    if names:
        found = [probe(posterior, name) for name in names]
        best = max(found, key=lambda x: x.thoughts.mean - x.majority)
        verdicts.append(
            f"A linear probe predicts the label '{best.label}' from the thoughts with {best.thoughts.mean:.0%} "
            f"accuracy on held-out documents ({best.sequences} sequences of {len(best.classes)} classes); a bag of "
            f"tokens reaches {best.tokens.mean:.0%}, the largest class {best.majority:.0%}, the best of 19 shuffles of "
            f"the thoughts {shuffled_probe(posterior, best.label).max():.0%}."
        )
        for name, other in inputs.against.items():
            if best.label in probable_labels(other):
                verdicts.append(f"Under '{name}' it is {probe(other, best.label).thoughts.mean:.0%}.")
        head = ("label (classes)", "sequences", "without a value", "thoughts", "bag of tokens", "largest class")
        tables.append(Table(head, [_row(x) for x in found]))
        by_thought = probe_thoughts(posterior, best.label)
        carry = int((by_thought["p_value"] < FOUND).sum())
        verdicts.append(
            f"{carry} of {by_thought['p_value'].size} thoughts predict it alone better than its largest class does "
            f"(p < {FOUND}, corrected for their number)."
        )
        pictures.append(plot_by_thought(by_thought["accuracy"], f"'{best.label}' from one thought", "accuracy"))
    if numbers:
        values = [regress(posterior, name) for name in numbers]
        well = max(values, key=lambda x: x.thoughts.mean)
        verdicts.append(
            f"A regression from the thoughts explains {max(well.thoughts.mean, 0):.0%} of the variance of "
            f"'{well.label}', one from a bag of tokens {max(well.tokens.mean, 0):.0%}."
        )
        rows = [
            (
                x.label,
                str(x.sequences),
                str(x.missing),
                *(f"{r.mean:.2f} ± {r.stderr:.2f}" for r in (x.thoughts, x.tokens)),
            )
            for x in values
        ]
        tables.append(Table(("number", "sequences", "without a value", "R² thoughts", "R² bag of tokens"), rows))
    return Section(" ".join(verdicts), tuple(pictures), tuple(tables))


def _row(x: Probe) -> tuple[str, ...]:
    shown, rare = ", ".join(_short(name) for name in x.classes), ""
    if x.too_rare:
        rare = f"; {len(x.too_rare)} classes of fewer than five documents are left out"
    return (
        f"{x.label} ({shown}{rare})",
        str(x.sequences),
        str(x.missing),
        f"{x.thoughts.mean:.1%} ± {x.thoughts.stderr:.1%}",
        f"{x.tokens.mean:.1%} ± {x.tokens.stderr:.1%}",
        f"{x.majority:.1%}",
    )


def _short(name: Label) -> str:
    return f"{name:.6g}" if isinstance(name, float) else str(name)


def other_models(inputs: ReportInputs) -> Section:
    """The evidence of the same documents under other models."""
    if not inputs.against:
        raise UsageError("Needs posteriors of the same texts under other models: give --against.")
    found = rank({"this": inputs.posterior, **inputs.against})
    first, second = found.candidates[:2]
    lead = f"{second.behind:.3f} ± {second.behind_stderr:.3f} nats per document"
    verdict = f"'{found.winner}' has the most evidence, {lead} ahead of '{second.name}'."
    if found.winner is None:
        verdict = f"No model is better beyond chance: '{first.name}' is first, {lead} ahead of '{second.name}'."
    if found.doubt:
        verdict += f" {found.doubt}."
    rows = [
        (x.name, f"{x.evidence:.2f}", f"{x.behind:.3f} ± {x.behind_stderr:.3f}", f"{x.weight:.3f}", str(x.untrusted))
        for x in found.candidates
    ]
    head = (
        "model",
        f"{found.estimator}, nats per document",
        "behind the first",
        "stacking weight",
        f"k-hat > {TRUSTED}",
    )
    return Section(verdict, (plot_ranking(found),), (Table(head, rows),))


def other_seeds(inputs: ReportInputs) -> Section:
    """How much of the geometry of the thoughts is there under the other models as well."""
    if not inputs.against:
        raise UsageError("Needs posteriors of the same texts under other seeds: give --against.")
    found = {name: agreement(inputs.posterior, other) for name, other in inputs.against.items()}
    least_name = min(found, key=lambda name: found[name].r2)
    least = found[least_name]
    verdict = (
        f"Rotated onto this model's thoughts, those of '{least_name}' explain {max(least.r2, 0):.0%} of their variance "
        f"on held-out documents ({'more than' if least.p_value < FOUND else 'no more than'} permuted documents do, p = "
        f"{least.p_value:.3f}); of a text's nearest ten texts they share {least.neighbours:.0%}, by chance "
        f"{least.by_chance:.0%}."
    )
    rows = [
        (
            name,
            f"{x.r2:.2f}",
            f"{np.quantile(x.null, 0.95):.2f}",
            f"{x.p_value:.3f}",
            ", ".join(f"{c:.2f}" for c in x.correlations),
            f"{x.neighbours:.0%} ({x.by_chance:.0%})",
        )
        for name, x in found.items()
    ]
    head = (
        "model",
        "R² after rotation",
        "95 % of permuted",
        "p",
        "canonical correlations",
        "shared neighbours (chance)",
    )
    return Section(verdict, (plot_agreement(least),), (Table(head, rows),))


def sensitivity(inputs: ReportInputs) -> Section:
    """What halving and doubling the weight of prior and likelihood would change, text by text."""
    posterior = inputs.posterior
    found = power_scaling(posterior, inputs.run)
    shift = abs(found["shift"]).max(THOUGHTS)
    far = (shift > FAR).sum("sequence")
    unknown = shift.isnull().any(("component", "alpha"))
    said = f"{int(far.max())} of {posterior.size} sequences"
    verdict = f"Halving or doubling the weight of prior or likelihood moves no coordinate by more than {FAR:g} sd of q."
    if far.any():
        verdict = (
            f"Halving or doubling the weight of prior or likelihood moves some coordinate of up to {said} by more than "
            f"{FAR:g} sd of q: there the answer is as much the prior's choice as the text's."
        )
    if unknown.any():
        verdict += (
            f" For {int(unknown.sum())} sequences weights say nothing (k-hat > {TRUSTED}): give --run to fit q again."
        )
    label = next(iter(probable_labels(posterior)), None)
    rows = []
    for component in found["component"].values:
        for alpha in found["alpha"].values:
            one = {"component": component, "alpha": alpha}
            mean, known = found["mean"].sel(one), ~unknown.values
            cells = [
                f"{component} to the power {alpha:g}",
                f"{float(shift.sel(one).median()):.2f}",
                str(int(far.sel(one))),
                str(int(found["refit"].sel(one).sum())),
                f"{_neighbours_changed(posterior.stats['mean'].values[known], mean.values[known]):.0%}",
            ]
            if label and known.all():
                accuracy = probe(posterior, label, mean.values.reshape(posterior.size, -1)).thoughts
                cells.append(f"{accuracy.mean:.1%} ± {accuracy.stderr:.1%}")
            rows.append(tuple(cells))
    head = [
        "",
        "median of the largest shift (sd)",
        f"sequences beyond {FAR:g} sd",
        "fitted again",
        "nearest text changes",
    ]
    if label and not unknown.any():
        now = probe(posterior, label).thoughts
        head.append(f"probe of '{label}' (now {now.mean:.1%})")
    return Section(verdict, (), (Table(tuple(head), rows),))


def _neighbours_changed(before: np.ndarray, after: np.ndarray) -> float:
    """The share of sequences whose nearest other sequence is another one."""
    if len(before) < 2:
        return 0.0
    one, other = (nearest_rows(x.reshape(len(x), -1), 1)[:, 0] for x in (before, after))
    return float((one != other).mean())
