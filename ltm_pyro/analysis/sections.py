"""The sections of a report: each has a verdict in plain words, pictures and tables."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from ltm_pyro.analysis.against_reference import (
    EFFECTIVE,
    NARROW,
    SHIFTED,
    WIDE,
    compare,
    differences,
    geometric_mean,
    largest_r_hat,
)
from ltm_pyro.analysis.context import default_lengths, shift
from ltm_pyro.analysis.information import active_units, aggregate, decompose, observed_batch
from ltm_pyro.analysis.interventions import ablate, attention, interpolate
from ltm_pyro.analysis.loo import loo_by_factor
from ltm_pyro.analysis.pictures.calibration import plot_contraction, plot_coverage, plot_ecdf, plot_ranks, plot_tarp
from ltm_pyro.analysis.pictures.chains import plot_chain_ranks, plot_trace
from ltm_pyro.analysis.pictures.thoughts import (
    plot_attention,
    plot_bounds,
    plot_by_thought,
    plot_pareto_k,
    plot_path,
    plot_scales,
    plot_shift,
)
from ltm_pyro.analysis.posterior import THOUGHTS, Posterior
from ltm_pyro.analysis.predictive import check
from ltm_pyro.analysis.section import ReportInputs, Section, Table
from ltm_pyro.analysis.sections_of_findings import (
    fast_steps,
    global_latents,
    labels,
    map_of_texts,
    other_models,
    other_seeds,
    sensitivity,
)
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.pareto import TRUSTED

FEW = 16  # sequences for the context lengths, because each length needs a fit of its own
SIZE = 0.05 / 4  # of each section that tests q, so that an exact q is flagged in 5 reports of 100 (Bonferroni)


def trust(inputs: ReportInputs) -> Section:
    """Pareto k-hat and the gap between the two bounds."""
    stats, size = inputs.posterior.stats, inputs.posterior.size
    if "pareto_k" not in stats:
        raise UsageError("The draws have no density q.")
    bad = int((~(stats["pareto_k"] <= TRUSTED)).sum())  # NaN is bad
    verdict = (
        f"q is close enough to the posterior for all {size} sequences, as far as its own draws can tell: k-hat ≤ "
        f"{TRUSTED}. A mode that q misses altogether is not seen; compare with chains."
    )
    if bad:
        verdict = (
            f"q is too narrow, or misses part of the posterior, for {bad} of {size} sequences: k-hat > "
            f"{TRUSTED}, or not a number. "
            f"Read their intervals with care, and do not reweight their draws."
        )
    pictures = [plot_pareto_k(inputs.posterior)]
    if "elbo" in stats:
        gap_N = (stats["iwae"] - stats["elbo"]).values
        finite = np.isfinite(gap_N)
        verdict += f" The importance-weighted bound is {gap_N[finite].mean():.2f} nats per sequence above the ELBO"
        verdict += "." if finite.all() else f", in the {finite.sum()} of {size} sequences that have finite bounds."
        pictures.append(plot_bounds(inputs.posterior))
    return Section(verdict, tuple(pictures), good=not bad)


def calibration(inputs: ReportInputs) -> Section:
    """Simulation-based calibration on texts that the model generated."""
    found = inputs.calibration
    if found is None:
        raise UsageError("Needs `ltm calibrate RUN --out FILE`: give --calibration.")
    p = found.p_value()
    result = "No sign that q differs from the posterior" if p > SIZE else "q is not the posterior"
    covered = float(found.coverage(np.array([0.9]))[0])
    verdict = (
        f"{result}, on {len(found.values)} texts that the model generated: p = {p:.3f}. "
        f"Its 90 % intervals contain {covered:.0%} of the true coordinates."
    )
    alone = found.p_values()
    rows = [
        (name, f"{alone[name]:.4f}" if alone[name] >= 1e-4 else "< 0.0001")
        for name in sorted(alone, key=lambda name: alone[name])[:5]
    ]
    pictures = tuple(plot(found) for plot in (plot_ranks, plot_ecdf, plot_coverage, plot_tarp, plot_contraction))
    return Section(verdict, pictures, (Table(("smallest p-values", "p"), rows),), good=p > SIZE)


def reference(inputs: ReportInputs) -> Section:
    """q compared with Markov chains."""
    if inputs.reference is None:
        raise UsageError("Needs chains of a few of the texts (`ltm posterior --method nuts`): give --reference.")
    found = compare(inputs.posterior, inputs.reference)
    coordinates, sequences = found["mean_error"].size, found.sizes["sequence"]
    limit = largest_r_hat(inputs.reference)
    counts, is_late = differences(found, SIZE), (~(found["r_hat"] <= limit)).values
    by_chains = is_late.all() or not any(differences(found.isel(sequence=~is_late), SIZE).values())
    verdict = (
        f"q does not differ from the chains by more than their own error in any of {coordinates} coordinates of "
        f"{sequences} sequences."
    )
    if any(counts.values()):
        late = "Where q differs, the chains have not converged, so that either may be wrong"
        verdict = (
            f"{late if by_chains else 'q is not the posterior'}: of {coordinates} coordinates the mean of "
            f"{counts['shifted']} is off by more than {SHIFTED} sd, {counts['narrow']} are too narrow (scale ratio < "
            f"{NARROW:g}) and {counts['wide']} too wide "
            f"(> {WIDE:.2f}); a classifier tells the draws of {counts['told apart']} of {sequences} sequences from "
            f"the chains'."
        )
    if is_late.any():
        verdict += (
            f" The chains of {int(is_late.sum())} sequences have not converged (R-hat > {limit:.3g}): run them longer."
        )
    if few := int((np.minimum(found["ess"], found["ess_tail"]) < EFFECTIVE).sum()):
        verdict += f" {few} have fewer than {EFFECTIVE} effective draws, too few to see small differences."
    ratio = geometric_mean(found["scale_ratio"], THOUGHTS)
    rows = [
        (
            str(index),
            f"{float(abs(row['mean_error']).max()):.2f}",
            f"{float(ratio[index]):.2f}",
            f"{float(row['correlation_q']):.2f} / {float(row['correlation']):.2f}",
            f"{float(row['c2st']):.2f} ± {float(row['c2st_stderr']):.2f}",
            f"{float(row['r_hat']):.3f}",
            f"{float(row['ess']):.0f} / {float(row['ess_tail']):.0f}",
        )
        for index, row in ((i, found.isel(sequence=i)) for i in range(sequences))
    ]
    head = (
        *("sequence", "largest error of a mean (sd)", "scale q / chains", "correlation q / chains", "C2ST", "R-hat"),
        "ESS bulk / tail",
    )
    by_thought = geometric_mean(found["scale_ratio"], ("dim",)).to_dataframe("ratio").reset_index()
    apart = by_thought.reindex(abs(np.log(by_thought["ratio"])).sort_values(ascending=False).index)
    worst = [
        (str(r["sequence"]), str(r["layer"]), str(r["thought"]), f"{r['ratio']:.2f}")
        for r in apart[:10].to_dict("records")
        if not NARROW <= r["ratio"] <= WIDE
    ]
    tables = (
        Table(head, rows),
        *([Table(("sequence", "layer", "thought", "scale q / chains"), worst)] if worst else []),
    )
    pictures = (plot_scales(found), *chain_pictures(inputs.reference))
    return Section(verdict, pictures, tables, good=not any(counts.values()) and not is_late.any())


def chains(inputs: ReportInputs) -> Section:
    """How the Markov chains of this posterior went."""
    posterior, stats = inputs.posterior, inputs.posterior.stats
    if "r_hat" not in stats:
        raise UsageError("These draws are q's, not those of Markov chains.")
    if "diverging" not in stats:
        raise UsageError("This file does not say how the chains went: draw it again with `ltm posterior`.")
    r_hat, ess = float(stats["r_hat"].max(skipna=False)), float(np.minimum(stats["ess"], stats["ess_tail"]).min())
    diverging = int(stats["diverging"].sum())
    limit = largest_r_hat(posterior)
    good = r_hat <= limit and ess >= EFFECTIVE and not diverging
    verdict = (
        f"{'No sign that the chains have not converged' if good else 'Do not rely on these draws'}: the largest R-hat "
        f"is {r_hat:.3f} (at most {limit:.3g}), the smallest effective sample size in bulk and tails {ess:.0f} (at "
        f"least {EFFECTIVE}), and {diverging} steps of {stats['diverging'].size:,} diverged."
    )
    chain_axes = ("draw", "sequence")
    energy = stats["energy"].transpose("chain", "sequence", "draw").values
    bfmi = (np.diff(energy, axis=-1) ** 2).mean(-1) / energy.var(-1)
    rows = [
        (
            str(number + 1),
            f"{float(stats['acceptance_rate'].mean(chain_axes)[number]):.2f}",
            f"{float(stats['tree_depth'].max(chain_axes)[number]):.0f}",
            f"{int(stats['diverging'].sum(chain_axes)[number])}",
            f"{bfmi[number].min():.2f}",
        )
        for number in range(len(energy))
    ]
    head = ("chain", "acceptance", "deepest tree", "divergences", "smallest E-BFMI")
    return Section(verdict, chain_pictures(posterior), (Table(head, rows),), good=good)


def chain_pictures(posterior: Posterior) -> tuple[Axes, ...]:
    """Trace and ranks of the coordinate whose R-hat is largest."""
    worst = posterior.stats["r_hat"].argmax(...)  # type: ignore[arg-type]
    one = posterior.z.isel({str(axis): index for axis, index in worst.items()})
    layer, thought = int(one["layer"]), int(one["thought"])
    name = f"sequence {int(one['sequence'])}, layer {layer}, thought {thought}, dim {int(one['dim'])}"
    return (plot_trace(one, name), plot_chain_ranks(one, name))


def information(inputs: ReportInputs) -> Section:
    """KL and active units by thought, and the KL as mutual information and marginal KL."""
    posterior, stats = inputs.posterior, inputs.posterior.stats
    units = active_units(posterior)
    coordinates = posterior.draws.sizes["coordinate"]
    verdict = f"{int(units.sum())} of {coordinates} coordinates depend on the text (active units)."
    pictures = [plot_by_thought(units, "Active units", "coordinates")]
    if "kl_by_thought" in stats:
        by_thought = stats["kl_by_thought"].mean("sequence")
        pictures.insert(0, plot_by_thought(by_thought, "KL by thought", "nats per sequence"))
    if inputs.run is None or "kl" not in stats:
        return Section(verdict, tuple(pictures))
    parts = decompose(inputs.run.model, inputs.run.guide, posterior)
    verdict += (
        f" Of {parts.average_kl:.2f} nats of KL per sequence, at least {parts.mutual_information:.2f} are mutual "
        f"information with the text and at most {parts.marginal_kl:.2f} the KL of the aggregated posterior to the "
        f"prior; {posterior.size} sequences can show log {posterior.size} = {parts.most:.2f} nats at most."
    )
    if parts.saturated:
        verdict += " They do (saturated): draws tell the texts apart, and how much more they say is not known."
    rows = [
        ("average KL", f"{parts.average_kl:.3f}", f"{parts.average_kl_stderr:.3f}"),
        ("mutual information (at least)", f"{parts.mutual_information:.3f}", f"{parts.mutual_information_stderr:.3f}"),
        ("marginal KL (at most)", f"{parts.marginal_kl:.3f}", f"{parts.marginal_kl_stderr:.3f}"),
    ]
    return Section(verdict, tuple(pictures), (Table(("nats per sequence", "", "± s.e."), rows),))


def aggregated(inputs: ReportInputs) -> Section:
    """Two-sample tests of the aggregated posterior against the prior."""
    found = aggregate(inputs.posterior)
    apart = found.mmd.p_value < SIZE
    result = "differs from" if apart else "cannot be told from"
    rows = [
        ("classifier accuracy (0.5: the same)", f"{found.c2st.mean:.3f} ± {found.c2st.stderr:.3f}"),
        ("MMD²", f"{found.mmd.mmd2:.2e} (p = {found.mmd.p_value:.3f})"),
    ]
    verdict = f"The aggregated posterior (one draw of each q) {result} the prior."
    return Section(verdict, (), (Table(("", ""), rows),), good=not apart)


def ablation(inputs: ReportInputs) -> Section:
    """The log-likelihood that each thought is worth to the decoder."""
    run = inputs.need_run()
    lost = ablate(run.model, inputs.posterior, run.start_token)
    worth = lost["by_layer"].values
    verdict = f"Without the thoughts of layer {int(worth.argmax()) + 1} a sequence costs {worth.max():.1f} nats more."
    rows = [
        (str(layer), f"{value:.2f}", "" if np.isnan(error) else f"{error:.2f}")
        for layer, (value, error) in enumerate(zip(worth, lost["by_layer_stderr"].values, strict=True), 1)
    ]
    picture = plot_by_thought(lost["by_thought"], "Loss without one thought", "nats per sequence")
    return Section(verdict, (picture,), (Table(("layer", "nats per sequence", "± s.e."), rows),))


def context_lengths(inputs: ReportInputs) -> Section:
    """The KL by context length, and the attention weights of one sequence."""
    run = inputs.need_run()
    some = inputs.posterior.select(slice(FEW))
    batch = observed_batch(some, run.start_token)
    moved = shift(run.model, run.guide, batch, run.inference, default_lengths(some))
    weights = attention(run, inputs.posterior, 0)
    kl = moved["kl_to_prior"].mean("sequence").values
    verdict = (
        f"The KL to the prior grows from {kl[0]:.1f} nats after {int(moved['context'][0])} tokens to {kl[-1]:.1f} "
        f"after {int(moved['context'][-1])} (first {some.size} sequences). The attention weights are of sequence 0."
    )
    return Section(verdict, (plot_shift(moved), *(plot_attention(weights, layer) for layer in range(len(weights)))))


def interpolation(inputs: ReportInputs) -> Section:
    """Interpolation between the thoughts of two texts."""
    run = inputs.need_run()
    if inputs.posterior.size < 2:
        raise UsageError("An interpolation needs two sequences: infer from more texts.")
    last = inputs.posterior.size - 1
    steps = interpolate(run, inputs.posterior, 0, last)
    rows = [(f"{step.share:.2f}", step.text[:300] or "(it ends at once)") for step in steps]
    verdict = f"Texts generated along the line from the thoughts of sequence 0 to those of sequence {last}."
    return Section(verdict, (plot_path(steps),), (Table(("weight of the second", "text"), rows),))


def predictive(inputs: ReportInputs) -> Section:
    """Posterior predictive checks: statistics of texts and replicas."""
    found = check(inputs.posterior, of_text=inputs.statistics)
    usual = found.p_value >= SIZE / found.sizes["statistic"]
    off = [str(name) for name in found.statistic.values[~usual.values]]
    unknown = [str(name) for name in found.statistic.values[~np.isfinite(found.difference).values]]
    one_document = len({*inputs.posterior.documents}) == 1
    off = [] if one_document else [name for name in off if name not in unknown]
    verdict = "The replicas do not differ from the texts in any statistic."
    if one_document:
        verdict = "The texts are of one document, so that differences have no error."
    if off:
        verdict = f"The replicas differ from the texts in: {', '.join(off)}."
    rows = [
        (
            str(name),
            f"{float(found.observed.sel(statistic=name)):.3g}",
            f"{float(found.replicated.sel(statistic=name).mean()):.3g}",
            f"{float(found.difference.sel(statistic=name)):.3g} ± {float(found.stderr.sel(statistic=name)):.2g}",
            f"{float(found.p_value.sel(statistic=name)):.3f}",
        )
        for name in found.statistic.values
    ]
    head = ("statistic", "texts", "replicas", "difference", "p")
    if unknown:
        verdict += f" Not a number for some text, and so not compared: {', '.join(unknown)}."
    judged = None if one_document or len(unknown) == len(rows) else not off
    return Section(verdict, (), (Table(head, rows),), good=judged)


def leave_one_out(inputs: ReportInputs) -> Section:
    """PSIS-LOO by factor."""
    found = loo_by_factor(inputs.posterior)
    there = np.isfinite(found.elpd)
    units, untrusted = int(there.sum()), int((~(found.pareto_k <= TRUSTED) & there).sum())
    value = float(found.elpd.mean())
    verdict = f"Without its own factor in the posterior a token has log-probability {value:.3f} nats on average."
    if untrusted:
        verdict += (
            f" For {untrusted:,} of {units:,} factors k-hat > {TRUSTED}: there the estimate is not reliable, because q "
            f"is too far from the leave-one-out posterior."
        )
    head = ("left out", "units", "log predictive density (nats)", f"k-hat > {TRUSTED}")
    row = ("a token's factor p(x_t | x_<t, z)", f"{units:,}", f"{value:.3f}", f"{untrusted:,}")
    return Section(verdict, (), (Table(head, [row]),))  # an exact q can have k-hat > 0.7 here


SECTIONS: dict[str, Callable[[ReportInputs], Section]] = {
    "Can q be trusted?": trust,
    "ELBO over the fast steps": fast_steps,
    "How the chains went": chains,
    "Calibration": calibration,
    "Against reference chains": reference,
    "Information in the thoughts": information,
    "Aggregated posterior": aggregated,
    "Global latents": global_latents,
    "Map of the texts": map_of_texts,
    "Labels": labels,
    "Other models of the same texts": other_models,
    "Other seeds": other_seeds,
    "Sensitivity to prior and likelihood": sensitivity,
    "Ablation": ablation,
    "Context length and attention": context_lengths,
    "Interpolation between two texts": interpolation,
    "Predictive checks": predictive,
    "Leave one out": leave_one_out,
}


def sections(inputs: ReportInputs) -> Iterable[tuple[str, Section]]:
    """Every section with its title; a section whose inputs are missing says which."""
    for title, make in SECTIONS.items():
        try:
            with torch.no_grad():
                yield title, make(inputs)
        except UsageError as missing:
            yield title, Section(f"Left out. {missing}")


def sequence_card(posterior: Posterior, sequence: int) -> dict[str, Any]:
    """The entry of one sequence: text, labels, figures and KL by thought."""
    stats = posterior.stats.isel(sequence=sequence)
    figures = {name: float(stats[name]) for name in ("elbo", "kl", "pareto_k") if name in stats}
    return {
        "index": sequence,
        "text": posterior.texts[sequence],
        "labels": {name: values[sequence] for name, values in posterior.labels.items() if values[sequence] is not None},
        "figures": figures,
        "kl": stats["kl_by_thought"].values.tolist() if "kl_by_thought" in stats else [],
        "replica": replicas[0, sequence] if (replicas := posterior.replicas) is not None else "",
    }
