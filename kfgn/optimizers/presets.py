"""Settings of the literature, as keyword arguments: every number has its source beside it."""

from typing import Any

from kfgn.optimizers.damping import Greedy, LevenbergMarquardt

#: For `kfgn.kfra`, `kfgn.kflr` and `kfgn.kfac`. "paper" is Botev, Ritter & Barber (2017) with
#: its printed thresholds. It leaves the initial dampings open: they are those of Martens &
#: Grosse (2015), whom it follows, with `γ = sqrt(τ + η)` there. The bounds are ours, wide.
#: Its curvature has `model_examples=None`: eq. (41) is about the whole batch.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "learning_rate": 1.0,  # eq. (33): the whole step
        "decay": 0.9,  # section 5: a moving average with a factor of 0.9
        "step_damping": LevenbergMarquardt(
            150.0,  # Martens & Grosse (2015), section 6.6: λ starts at 150
            minimum=0.0,
            maximum=1e10,
            period=5,  # appendix C.3.1: T_τ
            decay=0.95,  # appendix C.3.1: ω_τ = 0.95^T_τ
            thresholds=(0.75, 0.75),  # appendix C.3.1, as printed
            agreement=None,  # by ρ alone
        ),
        "factor_damping": Greedy(
            150.0**0.5,  # Martens & Grosse (2015), section 6.6: γ starts at sqrt(λ + η)
            minimum=1e-10,
            maximum=1e10,
            period=20,  # appendix C.3.2: T_γ
            decay=0.95,  # appendix C.3.2: ω_γ = 0.95^T_γ
        ),
        "refresh_factors_every": 1,  # algorithm 1: at every update
        "refresh_inverse_every": 1,  # likewise
        "inverse": "factored",  # eq. (36)
        "momentum": False,  # section 5: no momentum on the updates
        "average_decay": 0.95,  # eq. (45)
    },
}

#: For `kfgn.transforms.scale_by_conjugate_gradient`: "cnn" of the code that belongs to the
#: lecture on Newton methods for convolutional networks, "martens" of Martens (2010) and the
#: code that he published with it. The bounds of λ are ours, wide.
HESSIAN_FREE_PRESETS: dict[str, dict[str, Any]] = {
    "cnn": {
        "damping": LevenbergMarquardt(
            1.0,  # the code's initial λ
            minimum=1e-10,
            maximum=1e10,
            period=1,
            decay=2 / 3,  # the code's drop; its boost is 3/2
            thresholds=(0.25, 0.75),  # the code, as Martens (2010), section 4.1
            agreement=None,  # by ρ alone
        ),
        "tolerance": 0.1,  # the code's ξ of the truncated solution
        "max_iterations": 250,  # the code's greatest number of iterations
    },
    "martens": {
        "damping": LevenbergMarquardt(
            45.0,  # his code's initial λ
            minimum=1e-10,
            maximum=1e10,
            period=1,
            decay=2 / 3,  # section 4.1: λ <- 2/3 λ, or 3/2 λ
            thresholds=(0.25, 0.75),  # section 4.1: ρ > 3/4, or ρ < 1/4
            agreement=None,  # by ρ alone
        ),
        "tolerance": None,  # section 4.4: not by the residual
        "progress": 5e-4,  # section 4.4: ε = 0.0005
        "max_iterations": 250,  # his code's greatest number of iterations
        "warm_start": 0.95,  # his code's decay of the last solution; section 4.5
        "preconditioner": "diagonal",  # section 4.7
        "power": 0.75,  # section 4.7: α
    },
}
