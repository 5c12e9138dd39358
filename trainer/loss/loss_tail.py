"""The shape of the tail: the student's own tail, reweighted until it has the teacher's moments.

A bucket alone leaves the shape of the tail to the student. With token features u (formats/logprobs/features.py) the
cache says what the teacher's tail has as its mean feature, m_t. With m and C the mean and covariance of u
under the student's tail q~, the first-order reweighting that gives the student's tail that mean is

    p^_j = q~_j (1 + a . (u_j - m)),    a = (C + r I)^-1 (m_t - m)

which stands in for the teacher's unknown p~ (docs/method.md, "The shape of the tail"). It is q~ itself where
m_t = m, so nothing is added at the initial weights. r regularises: a share of the mean variance, and the
noise of the stored mean over the variance that drift is expected to cause, so that a mean read from a tail of
little mass, hence coarsely stored, counts for little. What rounding alone would explain is taken off a.

a is found at T = 1, where the moments were taken. A change of a . u_j in the logits is beta a . u_j at
another temperature; there the reweighting is divided by sqrt(1 + its variance), because a hot tail spreads
over tokens that the estimate at T = 1 knows little of. At T = 1 only its extremes are limited.

C: rows of the chunk, V: vocabulary, K: rows with teacher targets, F: token features, G: F + F (F + 1) / 2.
"""

from dataclasses import dataclass

import torch

FEATURE_UNIT = 32
VARIANCE_SHARE = 0.02
"""Part of r: this share of the mean variance of the features under the student's tail."""
DRIFT_VARIANCE = 0.02
"""The variance that fine-tuning is expected to cause in the mean of a feature of variance one."""
LEAST_RIDGE = 1e-6
LARGEST_DEVIATION = 4.0
"""Standard deviation of the reweighting at T = 1 that is let through: the gradient of a row that has drifted
beyond any estimate stays bounded."""
SLICE = 8192
"""Tokens of the vocabulary worked on at a time."""


@dataclass(frozen=True)
class FeatureTables:
    """Features as the loss multiplies with them."""

    values_FV: torch.Tensor
    """In the arithmetic's dtype."""
    products_VG: torch.Tensor
    """In the compute dtype: the features, then their products in pairs."""
    pair_FF: torch.Tensor
    """int64: which product is u_f u_g."""

    @classmethod
    def of(cls, codes_VF: torch.Tensor, compute: torch.dtype, arithmetic: torch.dtype) -> "FeatureTables":
        """From int8 codes; V F^2 / 2 multiplications."""
        num_features = codes_VF.shape[1]
        values_VF = codes_VF.to(arithmetic) / FEATURE_UNIT
        first, second = torch.triu_indices(num_features, num_features, device=codes_VF.device)
        products_VG = values_VF.new_empty(len(values_VF), num_features + len(first), dtype=compute)
        products_VG[:, :num_features] = values_VF
        at = num_features
        for f in range(num_features):  # the order of triu_indices
            products_VG[:, at : at + num_features - f] = values_VF[:, f, None] * values_VF[:, f:]
            at += num_features - f
        pair_FF = torch.empty(num_features, num_features, dtype=torch.int64, device=codes_VF.device)
        pair_FF[first, second] = pair_FF[second, first] = torch.arange(len(first), device=codes_VF.device)
        return cls(values_VF.t().contiguous(), products_VG, pair_FF)

    def statistics(
        self, weights_CV: torch.Tensor, sum_C: torch.Tensor, buffer_CV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [C, F], covariance [C, F, F]) of the features under weights that sum to `sum_C`.

        `buffer_CV` of the compute dtype takes the normalised weights where that is not the weights' own.
        """
        arithmetic = weights_CV.dtype
        scale_C1 = 1.0 / sum_C.clamp_min(torch.finfo(arithmetic).tiny)[:, None]
        if self.products_VG.dtype == arithmetic:
            moments_CG = (weights_CV @ self.products_VG) * scale_C1
        else:
            assert buffer_CV is not None
            torch.mul(weights_CV, scale_C1, out=buffer_CV)
            moments_CG = (buffer_CV @ self.products_VG).to(arithmetic)
        return self._central(moments_CG)

    def normalised_statistics(self, weights_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same under weights that sum to one, given in the compute dtype."""
        return self._central((weights_CV @ self.products_VG).to(self.values_FV.dtype))

    def _central(self, moments_CG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_features = len(self.values_FV)
        mean_CF = moments_CG[:, :num_features]
        second_CFF = moments_CG[:, num_features:][:, self.pair_FF]
        return mean_CF, second_CFF - mean_CF[:, :, None] * mean_CF[:, None, :]

    def reweight(self, weights_CV: torch.Tensor, slope_CF: torch.Tensor, offset_C: torch.Tensor) -> None:
        """weights *= offset + slope . u_j, in place."""
        for start in range(0, weights_CV.shape[1], SLICE):
            columns = slice(start, start + SLICE)
            factor = torch.addmm(offset_C[:, None], slope_CF, self.values_FV[:, columns])
            weights_CV[:, columns].mul_(factor)


def tilt(
    mean_KF: torch.Tensor,
    covariance_KFF: torch.Tensor,
    teacher_mean_KF: torch.Tensor,
    teacher_noise_K: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a [K, F]; the gain (m_t - m) (C + r I)^-1 (m_t - m) [K], less what the noise alone would make of it),
    both at T = 1.

    a is shrunk by the share of the gain that is not expected of the noise, none of it where all is (the
    positive-part rule of James and Stein, 1961): at the initial weights nothing but noise is there.
    """
    variance_K = covariance_KFF.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0.0)
    ridge_K = VARIANCE_SHARE * variance_K + teacher_noise_K / DRIFT_VARIANCE + LEAST_RIDGE
    identity_FF = torch.eye(mean_KF.shape[1], dtype=mean_KF.dtype, device=mean_KF.device)
    shift_KF = teacher_mean_KF - mean_KF
    system_KFF = covariance_KFF + ridge_K[:, None, None] * identity_FF
    # The variant without a check: a check would wait for the device.
    inverse_KFF = torch.linalg.inv_ex(system_KFF)[0]
    a_KF = torch.einsum("kfg,kg->kf", inverse_KFF, shift_KF)
    # Rounding cannot be off by more than there is: in a light tail, moments are rounded to zero.
    noise_K = torch.minimum(teacher_noise_K, variance_K)
    expected_K = noise_K * inverse_KFF.diagonal(dim1=1, dim2=2).sum(1)
    gain_K = (a_KF * shift_KF).sum(1)
    tiny = torch.finfo(gain_K.dtype).tiny
    kept_K = ((gain_K - expected_K) / gain_K.clamp_min(tiny)).clamp_min(0.0)
    return kept_K[:, None] * a_KF, gain_K - expected_K


def damping(a_KF: torch.Tensor, covariance_KFF: torch.Tensor, beta: float) -> torch.Tensor:
    """[K]: what x = beta a . (u - m) is multiplied with, given its variance under the student's tail.

    At T = 1, min(1, LARGEST_DEVIATION / sqrt(Var x)); at another temperature, 1 / sqrt(1 + Var x).
    """
    variance_K = beta * beta * torch.einsum("kf,kfg,kg->k", a_KF, covariance_KFF, a_KF).clamp_min(0.0)
    if beta == 1.0:
        return LARGEST_DEVIATION * variance_K.clamp_min(LARGEST_DEVIATION**2).rsqrt()
    return (1.0 + variance_K).rsqrt()
