"""How good every stage of a chain is on every task, and the numbers that the field sums it up by.

R[i][j], [stages + 1, tasks]: the goodness of the model after i stages on task j, higher being better: minus the
cross-entropy in nats, or the token accuracy. R[0] is the initial model. Definitions after Lopez-Paz and Ranzato 2017
(arXiv 1706.08840: accuracy, backward and forward transfer) and Chaudhry et al. 2018 (arXiv 1801.10112: forgetting,
intransigence), with the sign of forgetting such that more is worse.
"""

from dataclasses import dataclass

import numpy as np

from formats.errors import ConfigError

FORMULAS = {
    "accuracy": "mean over tasks of R[n][j]",
    "forgetting": "mean over j < n of max over l = j .. n - 1 of R[l][j], minus R[n][j]",
    "backward transfer": "mean over j < n of R[n][j] - R[j][j]",
    "forward transfer": "mean over j > 1 of R[j-1][j] - R[0][j]",
    "intransigence": "mean over tasks of R of multitask on j, minus R[j][j]",
    "above never seen": "mean over j < n of R[n][j] minus R of the model without task j",
}
"""Name -> definition, in the order in which they are printed."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What a matrix comes to; None where the chain is too short, or the control was not made."""

    values: dict[str, float | None]
    """Name of `FORMULAS` -> value."""

    @classmethod
    @np.errstate(invalid="ignore")  # a model that has diverged is at minus infinity
    def of(
        cls,
        matrix: np.ndarray,
        *,
        multitask: np.ndarray | None = None,
        never_seen: np.ndarray | None = None,
    ) -> "Summary":
        """Sum up R.

        Args:
            matrix: R, [n + 1, n], float64.
            multitask: [n], the goodness on every task of one model that learnt all of them at once.
            never_seen: [n], on task j of a model that learnt all but j.

        Raises:
            ConfigError: R is not of that shape.
        """
        R = np.asarray(matrix, np.float64)
        if R.ndim != 2 or R.shape[0] != R.shape[1] + 1 or not R.shape[1]:
            raise ConfigError(
                f"a retention matrix must have a row per stage and one for the initial model, got the shape {R.shape}"
            )
        n = R.shape[1]
        last, learnt = R[n], R[np.arange(1, n + 1), np.arange(n)]
        found: dict[str, float | None] = dict.fromkeys(FORMULAS)
        found["accuracy"] = float(last.mean())
        if n > 1:
            # Stages that had seen the task, the last one left out.
            best = np.array([R[j + 1 : n, j].max() for j in range(n - 1)])
            found["forgetting"] = float((best - last[:-1]).mean())
            found["backward transfer"] = float((last[:-1] - learnt[:-1]).mean())
            before = R[np.arange(1, n), np.arange(1, n)]
            found["forward transfer"] = float((before - R[0, 1:]).mean())
            if never_seen is not None:
                found["above never seen"] = float(
                    (last[:-1] - np.asarray(never_seen, np.float64)[:-1]).mean()
                )
        if multitask is not None:
            found["intransigence"] = float((np.asarray(multitask, np.float64) - learnt).mean())
        return cls(found)
