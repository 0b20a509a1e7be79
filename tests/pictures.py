"""The pictures of reproduce.json, which may be printed in grey; and how its rows are picked."""

import math
from pathlib import Path

STYLES = ("black", "-", "o"), ("#0072b2", "--", "s"), ("#d55e00", "-.", "^"), ("#009e73", ":", "D")
NAMES = {"mamba2": "Mamba-2", "mamba": "Mamba"}
# Perplexity ÷ the teacher's by attention kept (Table 6, Mamba, 7B).
PAPER = {0.5: 1.03, 0.25: 1.09, 0.0625: 1.22, 0: 1.66}


def students(rows, of):
    """The rows that match all of `of`, by seed; none of an arm of which a student diverged."""
    lost = {row["arm"] for row in rows if "diverged" in row}
    mine = [row for row in rows if row.get("arm") not in lost]
    mine = [row for row in mine if all(row.get(name) == value for name, value in of.items())]
    return sorted(mine, key=lambda row: row.get("seed", 0))


def values(rows, of, figure):
    return [row[figure] for row in students(rows, of) if row.get(figure) is not None]


def mean(values):
    """Mean and standard error, NaN where there are none, or one."""
    n = len(values)
    middle = sum(values) / n if n else math.nan
    square = sum((v - middle) ** 2 for v in values)
    return middle, math.sqrt(square / (n - 1) / n) if n > 1 else math.nan


def draw(report, place):
    """Writes quality.png, needle.png and speculation.png, those of which there are figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for picture in (quality, needle, speculation):
        with pyplot.rc_context({"font.size": 12, "axes.titlesize": 12, "lines.linewidth": 1.8}):
            figure = picture(report, pyplot.subplots)
            if figure:
                figure.savefig(Path(place) / f"{picture.__name__}.png", dpi=110)
                pyplot.close(figure)


def look(i):
    """How the i-th line is drawn; every other one has hollow markers, which lie on top."""
    colour, dashes, marker = STYLES[i % len(STYLES)]
    inside = "white" if i % 2 else colour
    how = dict(color=colour, linestyle=dashes, marker=marker, markerfacecolor=inside)
    return how | dict(markeredgewidth=1.5, zorder=2 + i % 2)


def distilled(report, arm):
    """{share of attention kept: key} of an arm's students after stage 2."""
    rows, n = report["rows"], report["size"]["n_layers"]
    found = students(rows, dict(arm=arm, stages="1 + 2"))
    counts = sorted({row["replaced"] for row in found})
    return {1 - c / n: dict(arm=arm, replaced=c, stages="1 + 2") for c in counts}


def quality(report, subplots):
    """KL and perplexity against the attention kept."""
    rows, found = report["rows"], {arm: distilled(report, arm) for arm in NAMES}
    if not any(found.values()):
        return None
    at = {0.5: 0, 0.25: 1, 0.125: 2, 0.0625: 2.5, 0: 3}  # places of shares
    figure, axes = subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    titles = ("kl", "KL to the teacher, nats a byte"), ("ratio", "perplexity ÷ teacher's")
    for axis, (name, title) in zip(axes, titles, strict=True):
        llama = mean(values(rows, dict(arm="Llama", stages="1 + 2"), name))[0]
        axis.axhline(llama, color="0.45", ls="--", label="the Llama through stage 2")
        for i, (arm, label) in enumerate(NAMES.items()):
            mine = [(at[share], *mean(values(rows, of, name))) for share, of in found[arm].items()]
            if mine:
                axis.errorbar(*zip(*mine, strict=True), capsize=4, label=label, **look(i))
        axis.set(title=title, xlabel="attention kept, %", xticks=range(4))
        axis.set_xticklabels(["50", "25", "12.5", "0"])
        axis.grid(alpha=0.3)
    paper, label = [[at[share] for share in PAPER], [*PAPER.values()]], "paper (Mamba, 7B)"
    axes[1].plot(*paper, color="0.6", ls=":", marker="*", ms=9, label=label)
    axes[0].set_ylim(bottom=0)
    handles = axes[1].get_legend_handles_labels()
    title = "± standard error of the mean over students"
    figure.legend(*handles, loc="outside upper center", ncols=2, title=title)
    return figure


def needle(report, subplots):
    """The share of needles found, by length and depth, of each model."""
    rows, models = report["rows"], {"teacher, 100 %": dict(arm="teacher")}
    for arm, label in NAMES.items():
        kept = distilled(report, arm).items()
        models |= {f"{label}, {100 * share:.3g} %": of for share, of in kept}
    found = {name: values(rows, of, "needles") for name, of in models.items()}
    found = {name: seeds for name, seeds in found.items() if seeds}
    if not found:
        return None
    down = -(-len(found) // 3)
    shape = dict(figsize=(9, 1.6 + 2.6 * down), squeeze=False, layout="constrained")
    figure, axes = subplots(down, 3, **shape)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, seeds) in zip(axes.flat, found.items(), strict=False):
        lengths = sorted(seeds[0], key=int)
        columns = [zip(*(seed[k] for seed in seeds), strict=True) for k in lengths]
        shares = [[100 * mean(one)[0] for one in column] for column in columns]
        image = axis.imshow([*zip(*shares, strict=True)], "Greys", vmin=0, vmax=100, aspect="auto")
        trained = report["size"]["teacher_context" if "teacher" in name else "context"]
        edge = sum(int(k) <= trained for k in lengths) - 0.5
        axis.axvline(edge, color="white", lw=4)
        axis.axvline(edge, color="black", ls="--")
        axis.set(title=name, xticks=range(len(lengths)), yticks=[0, len(shares[0]) - 1])
        axis.set_xticklabels(lengths, rotation=90)
        axis.set_yticklabels(["begin", "end"])
    figure.supxlabel("length in bytes; left of the dashed line: as the model was trained on")
    figure.supylabel("depth")
    figure.colorbar(image, ax=axes, label="needles found, %", aspect=30)
    return figure


def speculation(report, subplots):
    """Tokens a pass, and speed, against K, of sampled text."""
    rows, Ks = [row for row in report["rows"] if row.get("temperature")], report["size"]["Ks"]
    if not rows:
        return None
    targets, drafts = ([*dict.fromkeys(row[k] for row in rows)] for k in ("target", "draft"))
    shape = dict(sharex=True, sharey="row", squeeze=False, layout="constrained")
    figure, axes = subplots(2, len(targets), figsize=(9, 6.4), **shape)
    for target, column in zip(targets, axes.T, strict=True):
        for axis, name in zip(column, ("per_pass", "ratio"), strict=True):
            for i, draft in enumerate(drafts):
                of = dict(target=target, draft=draft)
                middles = [mean(values(rows, of, f"{name}@{K}"))[0] for K in Ks]
                axis.plot(Ks, middles, label=draft.replace("mamba2", "Mamba-2"), **look(i))
            axis.grid(alpha=0.3)
        column[0].set_title(f"target:\n{target}")
        column[1].axhline(1, color="0.5", linewidth=1, zorder=0)
        column[1].set_xticks(Ks)
    axes[0, 0].set(ylabel="tokens a pass")
    axes[1, 0].set(ylabel="speed ÷ plain decoding")
    figure.supxlabel("K, tokens drafted a pass (sampled text)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, title="draft")
    return figure
