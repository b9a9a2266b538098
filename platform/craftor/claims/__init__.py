"""The papers' claims, tested: which runs each needs, what it compares, and what may be said of the result.

`methods` lists the runs, `declared` the claims; `testing` trains and evaluates what is missing, `effects` turns scores
into an effect with an interval and a verdict, `table` writes `claims.json` and its Markdown.
"""
