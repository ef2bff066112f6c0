"""Cosines of texts that have nothing to do with an index: a hit that is no nearer is weak."""

from __future__ import annotations

import numpy as np

from bridgetower.inference.predictor import Predictor
from bridgetower.search.config import Vectors
from bridgetower.search.index import COLUMNS, Index, Unrelated

QUANTILE = 0.95
"""Share of the unrelated texts whose nearest vector is no nearer than the limit."""

TEXTS = (
    # Letters without a meaning.
    "asdf qwer zxcv",
    "lkjh poiu mnbv",
    "xqzt vbrm",
    "fghj tyui",
    "qqqq wwww",
    "zxv bnm hjk",
    "plokij uhygtf",
    "wkrp dlmn",
    "brrt znak",
    "oiuyt rewq",
    "ggg hhh",
    "vcxz fdsa rewq",
    "mnop qrst uvwx",
    "kjsd fhgk",
    "eiwo tuvn alsk",
    "yxcv bnmä ölkj",
    "tgb yhn ujm",
    "hfkdj shgfl",
    "aaa",
    "rtzu fgvb",
    "dkwe",
    # Words that make no sentence.
    "although seventh whichever",
    "hence beneath former",
    "reluctantly per annum",
    "moreover ledger tonic",
    "amid whom lest",
    "perhaps eleven thus",
    "onto nor because",
    "such else regarding",
    "twice somehow despite",
    "whereas minus ergo",
    "versus notwithstanding",
    "rather than until",
    "thereby of unless",
    "neither hitherto",
    "likewise thrice albeit",
    "ought seldom whence",
    "meanwhile quite any",
    "furthermore its",
    "besides every when",
    "unto hardly which",
    "via already none",
    # Sentences about things that no image shows.
    "the minutes of the last meeting",
    "interest rates rose by a quarter",
    "a proof by contradiction",
    "please reset my password",
    "grammar of the subjunctive",
    "why the parliament was dissolved",
    "terms and conditions apply",
    "the theory of supply and demand",
    "an error in line forty",
    "she forgot his name",
    "a rumour about the merger",
    "the third amendment to the treaty",
    "cancel my subscription",
    "an unpaid invoice",
    "the meaning of justice",
    "next Tuesday at noon",
    "he regrets the decision",
    "the square root of minus one",
    "a change of the tax law",
    "nobody knows the reason",
    "the end of the fiscal year",
    "an old grudge",
)


def note_unrelated(index: Index, predictor: Predictor) -> None:
    """Notes in an index the cosines of unrelated texts, unless that was done for about as many rows."""
    noted = index.unrelated
    num_rows = len(index)
    if num_rows == 0 or (noted is not None and abs(num_rows - noted.rows) <= noted.rows / 10):
        return
    texts = predictor.embed_texts(TEXTS, truncate=True).numpy()
    kinds: list[Vectors] = ["images", "captions"]
    if predictor.model.compares_pairs:
        kinds.append("pairs")
    best = {kind: np.full(len(TEXTS), -np.inf, np.float32) for kind in kinds}
    for rows in index.checked_scan([COLUMNS[kind] for kind in kinds]):
        for kind in kinds:
            values = rows[COLUMNS[kind]].combine_chunks()
            if kind != "images":
                values = values.flatten()  # lists of vectors
            vectors = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, texts.shape[1])
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            is_usable = lengths[:, 0] > 0
            cosines = texts @ (vectors[is_usable] / lengths[is_usable]).T
            largest = cosines.max(axis=1, initial=-np.inf)
            np.maximum(best[kind], largest, out=best[kind])
    limits = {
        kind: float(np.quantile(cosines, QUANTILE))
        for kind, cosines in best.items()
        if np.isfinite(cosines).all()
    }
    index.set_unrelated(Unrelated(rows=num_rows, **limits))
