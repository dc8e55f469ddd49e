"""The table of the comparison with what a user would pick instead."""

from experiments import frameworks


def test_ratios_are_those_within_a_round():
    """Ours halves its speed in the second round, and so does the peer: the ratio stays."""
    rows = [
        {
            "peer": peer,
            "round_number": i,
            "training_seconds": (i + 1) * seconds,
            "added_mebibytes": 10.0,
            "test_loss": 19.0,
        }
        for peer, seconds in (("vae_jax", 2.0), ("pythae", 10.0))
        for i in range(2)
    ]
    header, ours, other = frameworks.table(rows)
    assert header[:3] == ["trainer", "seconds", "times ours"]
    assert ours[:3] == ["vae_jax", "3 (2-4)", "1.00 (1.00-1.00)"]
    assert other == ["pythae", "15 (10-20)", "5.00 (5.00-5.00)", "10", "19.00"]
