"""The pictures of reproduce.json, which may be printed in grey; and how its rows are picked."""

import math
from pathlib import Path

STYLES = [  # of lines: colour, dashes, marker
    ("black", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#009e73", ":", "D"),
]
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
    """Writes quality.png, needle.png and speculation.png, of which the report holds figures.

    Returns their paths.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for picture in (quality, needle, speculation):
        with pyplot.rc_context({"font.size": 12, "axes.titlesize": 12, "lines.linewidth": 1.8}):
            figure = picture(report, pyplot.subplots)
            if figure:
                paths.append(Path(place) / f"{picture.__name__}.png")
                figure.savefig(paths[-1], dpi=110)
                pyplot.close(figure)
    return paths


def look(i):
    """How the i-th line is drawn; every other one has hollow markers, which lie on top."""
    colour, dashes, marker = STYLES[i % len(STYLES)]
    inside = "white" if i % 2 else colour
    how = dict(color=colour, linestyle=dashes, marker=marker, markerfacecolor=inside)
    return how | dict(markeredgewidth=1.5, zorder=2 + i % 2)


def distilled(report):
    """[(mixer, share of attention kept, key)] of the students after stage 2."""
    rows, n = report["rows"], report["size"]["n_layers"]
    counts = {(r["arm"], r["replaced"]) for r in rows if r.get("stages") == "1 + 2"}
    found = []
    for arm in NAMES:
        for count in sorted(c for name, c in counts if name == arm):
            found.append((arm, 1 - count / n, dict(arm=arm, replaced=count, stages="1 + 2")))
    return [one for one in found if students(rows, one[2])]


def quality(report, subplots):
    """KL and perplexity against the attention kept."""
    found, rows = distilled(report), report["rows"]
    if not found:
        return None
    kept = sorted({share for _, share, _ in found} | {0.5, 0.25, 0.125, 0}, reverse=True)
    at = {share: i for i, share in enumerate(kept)}
    at[0.0625] = len(kept) - 1.5  # the paper's, half-way from 12.5 to 0
    figure, axes = subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    titles = {"kl": "KL to the teacher, nats a byte", "ratio": "perplexity ÷ teacher's"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        llama = values(rows, dict(arm="Llama", stages="1 + 2"), name)
        if llama:
            axis.axhline(mean(llama)[0], color="0.45", ls="--", label="the Llama through stage 2")
        for i, (arm, label) in enumerate(NAMES.items()):
            mine = [
                (at[share], *mean(values(rows, of, name))) for a, share, of in found if a == arm
            ]
            if mine:
                axis.errorbar(*zip(*mine, strict=True), capsize=4, label=label, **look(i))
        names = [f"{100 * share:.3g}" for share in kept]
        axis.set(title=title, xlabel="attention kept, %", xticks=range(len(kept)))
        axis.set_xticklabels(names)
        axis.grid(alpha=0.3)
    places, label = [at[share] for share in PAPER], "paper (Mamba, 7B; also at 6.25 %)"
    axes[1].plot(places, [*PAPER.values()], color="0.6", ls=":", marker="*", ms=9, label=label)
    axes[0].set_ylim(bottom=0)
    title = "± standard error of the mean over students"
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, title=title)
    return figure


def needle(report, subplots):
    """The share of needles found, by length and depth, of each model."""
    rows, size = report["rows"], report["size"]
    models = {"teacher, 100 %": dict(arm="teacher")}
    models |= {f"{NAMES[arm]}, {100 * share:.3g} %": of for arm, share, of in distilled(report)}
    found = {name: values(rows, of, "needles") for name, of in models.items()}
    found = {name: seeds for name, seeds in found.items() if seeds}
    if not found:
        return None
    across, down = min(3, len(found)), -(-len(found) // 3)
    shape = dict(figsize=(9, 1.6 + 2.6 * down), squeeze=False, layout="constrained")
    figure, axes = subplots(down, across, **shape)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, seeds) in zip(axes.flat, found.items(), strict=False):
        lengths = sorted(seeds[0], key=int)
        columns = [zip(*(seed[k] for seed in seeds), strict=True) for k in lengths]
        shares = [[100 * mean(one)[0] for one in column] for column in columns]
        image = axis.imshow([*zip(*shares, strict=True)], "Greys", vmin=0, vmax=100, aspect="auto")
        trained = size["teacher_context" if name.startswith("teacher") else "context"]
        edge = sum(int(k) <= trained for k in lengths) - 0.5
        axis.axvline(edge, color="white", lw=4)
        axis.axvline(edge, color="black", ls="--")
        last = len(shares[0]) - 1
        axis.set(title=name, xticks=range(len(lengths)), yticks=[0, last / 2, last])
        axis.set_xticklabels(lengths, rotation=90)
        axis.set_yticklabels(["0 %", "50 %", "100 %"])
        axis.label_outer()
    figure.suptitle("model, attention kept")
    figure.supxlabel("length in bytes; left of the dashed line: as the model was trained on")
    figure.supylabel("depth (0 % = beginning)")
    figure.colorbar(image, ax=axes, label="needles found, %", aspect=30)
    return figure


def speculation(report, subplots):
    """Tokens a pass, and speed, against K, of sampled text."""
    rows, Ks = [row for row in report["rows"] if row.get("temperature")], report["size"]["Ks"]
    if not rows:
        return None
    targets, drafts = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("target", "draft")
    )
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
    axes[0, 0].set_ylabel("tokens a pass")
    axes[1, 0].set_ylabel("speed ÷ plain decoding")
    figure.supxlabel("K, tokens drafted a pass (sampled text)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, title="draft")
    return figure
