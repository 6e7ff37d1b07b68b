"""What a run costs before it starts: memory of the fullest rank, and wall time.

``memory`` counts tensors, ``rates`` holds what CPUs were measured to do, and ``hardware``, ``products``, ``layer`` and
``step`` derive the time of a step from figures of a cluster that nobody has measured.
"""
