"""Fit what stands in for a head's far keys to the head's own soft-max, one site at a time.

menu       which maps are fitted, and which choices of all candidates are tried
rows       what is kept of a site while the model runs: some rows of queries, all keys and values
hybrid     the head with soft-max over near keys and a feature map for the far ones, and how far it is from the head
closed     maps that need no training: random features, centroids, an expansion; and a ridge that sets their level
learned    exponential maps trained on the head's own output
site       all of these for all heads of a site, each head keeping what does best on rows held out
"""
