"""What the paper found: Mixtral-8x7B quantized with HQQ, for comparison.

Source: Eliseev and Mazur, https://arxiv.org/abs/2312.17238, Table 1.
"""

from typing import NamedTuple

ATTENTION_BITS = (16, 4, 3, 2)
EXPERTS_BITS = (16, 4, 3, 2)


class PaperResult(NamedTuple):
    size_gib: float
    wikitext2_perplexity: float


# By bits of attention and experts.
PAPER_RESULTS = {
    (16, 16): PaperResult(86.99, 3.59),
    (16, 4): PaperResult(25.82, 3.67),
    (16, 3): PaperResult(23.21, 3.96),
    (16, 2): PaperResult(19.33, 4.52),
    (4, 16): PaperResult(85.16, 3.68),
    (4, 4): PaperResult(23.99, 3.76),
    (4, 3): PaperResult(21.37, 4.05),
    (4, 2): PaperResult(17.54, 4.61),
    (3, 16): PaperResult(85.08, 3.99),
    (3, 4): PaperResult(23.92, 4.06),
    (3, 3): PaperResult(21.31, 4.34),
    (3, 2): PaperResult(17.46, 4.90),
    (2, 16): PaperResult(84.96, 4.98),
    (2, 4): PaperResult(23.79, 5.08),
    (2, 3): PaperResult(21.18, 5.36),
    (2, 2): PaperResult(17.30, 5.97),
}


def preset_of(attention: int, experts: int) -> str:
    """The preset for one of the paper's mixes."""
    return "bf16" if attention == experts == 16 else f"attn{attention}-experts{experts}"
