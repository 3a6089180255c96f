"""What the five student reports published, as data: shown beside our numbers, never mixed with them.

AU-FA-FR is on each report's own random 80/20 validation part, best epoch, one run. Speed-up and
compression are as printed; ``base`` names the hidden size of the baseline they refer to.
"""

import pandas as pd

from kwslib.config import CRNNConfig

BAR = 5.5e-5  # the course's bar: 1.1 x the AU-FA-FR of its baseline, 5e-5

_COLUMNS = ("row", "setting", "ours", "speed_up", "compression", "base", "au_fa_fr")
_ROWS = (
    ("A1", "dark knowledge, T = 10, KD weight 0.6", "a1-kd", 10.3, 11.7, 64, 6.5e-5),
    ("A2", "dark knowledge, one-linear-layer attention", "a2-kd", 10.2, 12.9, 64, None),
    ("A3", "A1 trained in mixed precision, kept in fp16", "a1-kd-mixed-fp16", 10.3, 19.2, 64, 5.34e-5),
    ("B0", "baseline, fixed permutation", "baseline", 1.0, 1.0, 64, 2.9e-5),
    ("B1", "dark knowledge, 25 runs of tuning", "b1-kd", 5.3, 6.5, 64, 3.7e-5),
    ("B2", "dark knowledge + attention KD, bottleneck", "b2-attention", 5.3, 6.6, 64, 5.2e-5),
    ("B3", "B2 + dynamic int8", "b2-attention-int8", 5.3, 16.0, 64, 5.2e-5),
    ("C1", "mild dark knowledge, the middle student", "c1-kd", None, None, 64, None),
    ("C2", "two-stage dark knowledge", "c2-kd", 10.08, None, 64, None),
    ("C3", "C2 + dynamic int8", "c2-kd-int8", 10.08, 20.35, 64, 5.25e-5),
    ("C5", "pruning 0.3, each gate cut for itself, tuned: 100 times worse", "prune-30-tuned", None, None, 64, None),
    ("D", "dark knowledge, best of nine settings", "d-kl-labels", 4.65, 3.80, 32, 5.5009e-5),
    ("E1", "layer-wise KD, GRU", "e1-layers", 2.059, 2.578, 32, None),
    ("E2", "layer-wise KD, RNN instead of GRU", "e2-layers", 8.507, 7.623, 32, None),
    ("E3", "E2 in fp16", "e2-layers-fp16", 8.507, 12.045, 32, 5.132e-5),
)

# Architectures of the reports: name -> (sizes, parameters, MACs for a
# batch of 128 clips of 1 s without and with the convolution's bias).
ARCHITECTURES = {
    "base": (CRNNConfig(), 70_443, 119_324_672, 119_527_424),
    "base, h32": (CRNNConfig(hidden_size=32), 25_387, 55_382_016, 55_584_768),
    "A1": (CRNNConfig(2, hidden_size=22, gru_num_layers=1), 4_737, 11_579_392, 11_630_080),
    "A2": (CRNNConfig(2, hidden_size=24, gru_num_layers=1, attention_size=0), 4_741, 11_630_592, 11_681_280),
    "B1": (CRNNConfig(4, hidden_size=20), 9_047, 22_617_600, 22_718_976),
    "B2": (CRNNConfig(4, hidden_size=20, attention_size=15), 8_937, 22_469_760, 22_571_136),
    "C-mid": (CRNNConfig(8, hidden_size=40), 34_731, 68_664_320, 68_867_072),
    "C-small": (CRNNConfig(2, stride=(2, 6), hidden_size=16, gru_num_layers=1), 3_117, 11_788_288, 11_852_800),
    "C-prune": (CRNNConfig(8, (5, 16), (2, 6), hidden_size=24), 17_163, 54_334_464, 54_610_944),
    "C-pruned": (CRNNConfig(8, (5, 16), (2, 6), hidden_size=17), 11_157, 42_653_312, 42_929_792),
    "D": (CRNNConfig(3, (7, 20), (7, 12), hidden_size=30), 11_256, 11_888_640, 11_902_080),
    "E1": (CRNNConfig(8, (10, 20), (5, 8), hidden_size=20), 9_291, 26_897_920, 26_976_768),
    "E2": (CRNNConfig(3, stride=(5, 8), hidden_size=20, cell="rnn"), 2_546, 6_510_080, 6_543_872),
}


# What the reports' architectures take on disk: bytes of torch.save(state_dict) of torch 2.11 in float32, float16 and
# dynamic int8, recounted from the architectures, the model free of a profiler's leftovers.
FILE_BYTES = {
    "base": (287_691, 146_827, 84_177), "base, h32": (107_467, 56_715, 37_841), "A1": (23_623, 14_215, 12_941),
    "A2": (23_109, 13_637, 11_657), "B1": (41_867, 23_563, 19_409), "B2": (41_419, 23_371, 19_281),
    "C-mid": (144_651, 75_147, 47_313), "C-small": (17_351, 11_015, 11_341), "D": (50_443, 28_107, 22_225),
    "E1": (42_827, 24_075, 23_249), "E2": (15_947, 10_635, 16_657),
}  # fmt: skip


def beside(summary: pd.DataFrame) -> pd.DataFrame:
    """Each published row that one of our experiments repeats, with our figures next to it.

    Args:
        summary: of ``kwslib.results.records.summary``.
    """
    rows = pd.DataFrame(_ROWS, columns=_COLUMNS).set_index("row")
    rows = rows[rows["ours"].isin(summary.index)]
    found = summary.loc[rows["ours"]]
    out = {"setting": rows["setting"], "hidden units of their baseline (ours: 64)": rows["base"]}
    for name, column in (("speed_up", "speed_up"), ("compression", "compression"), ("AU-FA-FR", "au_fa_fr")):
        out |= {f"{name}, published": rows[column], f"{name}, ours": found[column].to_numpy()}
    return pd.DataFrame(out)
