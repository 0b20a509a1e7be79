"""The pictures of reproduce.json."""

import math
from pathlib import Path

STYLES = [
    ("black", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#009e73", ":", "D"),
    ("0.45", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#56b4e9", (0, (1, 3)), "P"),
    ("#cc79a7", (0, (8, 3)), "X"),
]  # of lines; every other one has hollow markers, which lie on top
NAMES = {"mamba2": "Mamba-2", "mamba": "Mamba"}
PAPER = {
    0.5: 1.03,
    0.25: 1.09,
    0.0625: 1.22,
    0: 1.66,
}  # perplexity ÷ teacher's by attention kept (Table 6)


def draw(report, place):
    """Writes a picture of each part of a loaded reproduce.json into the folder `place`, as far as the part is there; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    Path(place).mkdir(parents=True, exist_ok=True)
    found, scans, paths = (
        {arm: students(report, arm) for arm in NAMES},
        report.get("scan") or [],
        [],
    )
    for picture, data in (
        (quality, any(found.values()) and found),
        (needle, needles(report, found)),
        (speculation, report.get("speculation")),
        (cost, report.get("cost")),
        (scan, any(r["ms"] for r in scans) and scans),
    ):
        if data:
            sizes = {
                f"{key}size": 12 for key in ("font.", "axes.title", "figure.label", "figure.title")
            }
            with pyplot.rc_context({**sizes, "lines.linewidth": 1.8}):
                figure = picture(report, data, pyplot.subplots)
                paths.append(Path(place) / f"{picture.__name__}.png")
                figure.savefig(paths[-1], dpi=110)
                pyplot.close(figure)
    return paths


def students(report, arm):
    """{share of attention kept: an arm's rows after stage 2, one for each seed}, the largest share first; of an arm of which a student diverged none."""
    mine = [r for r in report.get("rows") or [] if r.get("arm") == arm]
    rows = (
        [r for r in mine if r.get("stages") == "1 + 2"]
        if not any("diverged" in r for r in mine)
        else []
    )
    return {
        1 - c / report["size"]["n_layers"]: [r for r in rows if r["replaced"] == c]
        for c in sorted({r["replaced"] for r in rows})
    }


def needles(report, found):
    """{model: what each seed found}."""
    models = {
        f"{NAMES[arm]}, {100 * share:.3g} %": [r["needles"] for r in rows if "needles" in r]
        for arm in found
        for share, rows in found[arm].items()
    }
    models = {
        "teacher, 100 %": [n for n in [report.get("teacher", {}).get("needles")] if n],
        **models,
    }
    return {name: seeds for name, seeds in models.items() if seeds}


def mean(values):
    """Mean and standard error, NaN where there are none, or one."""
    middle = sum(values) / len(values) if values else math.nan
    return middle, math.sqrt(
        sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values)
    ) if len(values) > 1 else math.nan


def look(i):
    """How the i-th line is drawn."""
    colour, dashes, marker = STYLES[i % len(STYLES)]
    return dict(
        color=colour,
        linestyle=dashes,
        marker=marker,
        markerfacecolor="white" if i % 2 else colour,
        markeredgewidth=1.5,
        zorder=2 + i % 2,
    )


def short(length):
    """512 or 16k."""
    return f"{length}" if length % 1024 else f"{length // 1024}k"


def by_length(axis, lines):
    """Of {name: {length: value}} a line each, both scales logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for i, (name, values) in enumerate(lines.items()):
        axis.plot(
            sorted(values), [values[k] or math.nan for k in sorted(values)], label=name, **look(i)
        )
    lengths = sorted({k for values in lines.values() for k in values})
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(
        lengths[:: 1 + (len(lengths) > 3)], map(short, lengths[:: 1 + (len(lengths) > 3)])
    )
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(
        LogLocator(subs=(1,) if high / low > 50 else (1, 2, 5))
        if high / low > 8
        else MaxNLocator(5)
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    (
        axis.xaxis.set_minor_locator(NullLocator()),
        axis.yaxis.set_minor_locator(NullLocator()),
        axis.grid(alpha=0.3),
    )


def quality(report, found, subplots):
    """KL and perplexity against the attention kept."""
    kept = sorted({0.5, 0.25, 0.125, 0}.union(*found.values()), reverse=True)
    at = {
        0.0625: len(kept) - 1.5,
        **{share: i for i, share in enumerate(kept)},
    }  # the paper's 6.25 % is half-way from 12.5 to 0
    figure, axes = subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    alone = [r for rows in students(report, "Llama").values() for r in rows]
    for axis, key, title in zip(
        axes, ("kl", "ratio"), ("KL to the teacher, nats a byte", "perplexity ÷ teacher's")
    ):
        if alone:
            axis.axhline(
                mean([r[key] for r in alone])[0],
                color="0.45",
                linestyle=(0, (6, 2)),
                zorder=1,
                label="the Llama through stage 2",
            )
        for i, arm in enumerate(arm for arm in found if found[arm]):
            middles, errors = zip(*(mean([r[key] for r in rows]) for rows in found[arm].values()))
            axis.errorbar(
                [at[share] + 0.06 * i for share in found[arm]],
                middles,
                errors,
                capsize=4,
                label=NAMES[arm],
                **look(i),
            )
        axis.set(
            title=title,
            xlabel="attention kept, %",
            xticks=range(len(kept)),
            xticklabels=[f"{100 * share:.3g}" for share in kept],
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    light = dict(color="0.6", linestyle=":", marker="*", markersize=9, zorder=1)
    axes[1].errorbar([at[k] for k in PAPER], [*PAPER.values()], label="paper (Mamba, 7B)", **light)
    axes[1].annotate(
        "6.25 %",
        (at[0.0625], PAPER[0.0625]),
        (-8, 6),
        textcoords="offset points",
        ha="right",
        fontsize=11,
        color="0.4",
    )
    figure.legend(
        *axes[1].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        title="± standard error of the mean over students",
    )
    return figure


def needle(report, models, subplots):
    """The share of needles found, by length and depth, of each model."""
    lengths, across, down = (
        sorted([*models.values()][0][0], key=int),
        min(3, len(models)),
        -(-len(models) // 3),
    )
    figure, axes = subplots(
        down, across, figsize=(9, 1.6 + 2.6 * down), squeeze=False, layout="constrained"
    )
    for i, (axis, (name, seeds)) in enumerate(zip(axes.flat, models.items())):
        shares = [
            [100 * mean(cell)[0] for cell in zip(*(seed[k] for seed in seeds))] for k in lengths
        ]
        image = axis.imshow([*zip(*shares)], "Greys", vmin=0, vmax=100, aspect="auto")
        trained = report["size"]["teacher_context" if name.startswith("teacher") else "context"]
        for width, colour, dashes in ((4, "white", "-"), (1.8, "black", (0, (3, 2)))):
            axis.axvline(
                sum(int(k) <= trained for k in lengths) - 0.5,
                color=colour,
                linewidth=width,
                linestyle=dashes,
            )
        axis.set(
            title=name,
            xticks=range(len(lengths)),
            yticks=[(len(shares[0]) - 1) * depth for depth in (0, 0.5, 1)],
        )
        axis.set_xticklabels(
            [short(int(k)) if i + across >= len(models) else "" for k in lengths], rotation=90
        )
        axis.set_yticklabels(["", "", ""] if i % across else ["0 %", "50 %", "100 %"])
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    figure.suptitle("model, attention kept")
    figure.supxlabel(
        "length in bytes (k = 1024); left of the dashed line: as the model was trained on"
    )
    figure.supylabel("depth (0 % = beginning)")
    figure.colorbar(image, ax=axes, label="needles found, %", aspect=30)
    return figure


def speculation(report, rows, subplots):
    """Tokens a pass, and speed, against K."""
    rows = sorted([r for r in rows if r["temperature"]] or rows, key=lambda r: r["K"])
    targets, drafts = (list(dict.fromkeys(r[key] for r in rows)) for key in ("target", "draft"))
    figure, axes = subplots(
        2,
        len(targets),
        figsize=(9, 6.4),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for target, (above, below) in zip(targets, axes.T):
        for i, draft in enumerate(drafts):
            mine = [r for r in rows if (r["target"], r["draft"]) == (target, draft)]
            above.plot(
                [r["K"] for r in mine],
                [mean(r["per_pass"])[0] for r in mine],
                label=draft.replace("mamba2", "Mamba-2"),
                **look(i),
            )
            below.plot(
                [r["K"] for r in mine], [r["tokens_s"] / r["plain"] for r in mine], **look(i)
            )
        above.set_title("target:\n" + target.replace("mamba2", "Mamba-2").replace("mamba", "Mamba"))
        below.set_xticks(sorted({r["K"] for r in rows}))
        (
            below.axhline(1, color="0.5", linewidth=1, zorder=0),
            above.grid(alpha=0.3),
            below.grid(alpha=0.3),
        )
    axes[0, 0].set_ylabel("tokens a pass"), axes[1, 0].set_ylabel("speed ÷ plain decoding")
    figure.supxlabel(
        f"K, tokens drafted a pass ({'sampled' if rows[0]['temperature'] else 'greedy'} text)"
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, title="draft"
    )
    return figure


def cost(report, rows, subplots):
    """Reading, writing and memory against length."""
    figure, axes = subplots(1, 3, figsize=(9, 4.6), layout="constrained")
    for axis, key, unit, title in zip(
        axes,
        ("read", "step_ms", "bytes"),
        (1, 1, 2**20),
        ("reading it all, s", "one more token, ms", "cache, MiB"),
    ):
        lines = {}
        for r in rows:
            share, other = (
                r["mixers"].count("attention") / len(r["mixers"]),
                NAMES.get(r["mixers"][0]),
            )
            lines.setdefault(f"{100 * share:.3g} %" + (f", {other}" if other else ""), {})[
                r["length"]
            ] = r[key] / unit
        by_length(axis, lines)
        axis.set_title(title)
    figure.supxlabel("length in tokens (k = 1024)")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        title="attention kept",
    )
    return figure


def scan(report, rows, subplots):
    """Time of forward and backward against length; what was not measured breaks the line off."""
    figure, axis = subplots(figsize=(7, 5), layout="constrained")
    by_length(
        axis,
        {
            name: {r["length"]: r["ms"] for r in rows if r["name"] == name}
            for name in dict.fromkeys(r["name"] for r in rows)
        },
    )
    axis.set(xlabel="length in tokens (k = 1024)", ylabel="forward + backward, ms of the GPU")
    figure.legend(loc="outside upper center", ncols=2)
    return figure
