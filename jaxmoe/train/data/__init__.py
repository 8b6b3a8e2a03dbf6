"""What a model is trained on: documents from files, packed into rows, in an order that is a function of the step."""

from jaxmoe.train.data.batch import Batch
from jaxmoe.train.data.corpus import Corpus, DataOptions, load_corpus, make_tokenizer
from jaxmoe.train.data.evaluation import evaluation_rows, gzip_bits_per_byte
from jaxmoe.train.data.rows import Loader, Rows
from jaxmoe.train.data.stream import Stream

__all__ = [
    "Batch",
    "Corpus",
    "DataOptions",
    "Loader",
    "Rows",
    "Stream",
    "evaluation_rows",
    "gzip_bits_per_byte",
    "load_corpus",
    "make_tokenizer",
]
