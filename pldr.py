"""PLDR-LLMs in Python: a bundle, an export of `pldr export hf`, or a run by its YAML.

from pldr import load
model = load("runs/quickstart/bundle")
model.generate(["To be"])                                   # a list of completions; `stream` gives one in pieces
model.score("To be, or", [" not to be", " not to see"])     # log-probabilities of continuations
model.logprobs("To be, or not to be")                       # of each token of a text
model.certificate["statement"]
"""

from pipeline.errors import Caution, UserError
from pipeline.inference.runtime import Bundle, NotFiniteRows
from pipeline.inference.scoring import Scored

load = Bundle.load

__all__ = ["Bundle", "Caution", "NotFiniteRows", "Scored", "UserError", "load"]
