"""The article's claims: what is measured for each, whether it is reached, and by which results.

`benchmarks/claims.yaml` of a checkout declares the claims (`declaration`); `evaluation` computes
their figures from the files in `benchmarks/results/`; `history` asks git whether a result is older
than the code that it measures; `runs` makes results anew, each in a `child` process. None of them
loads torch.
"""
