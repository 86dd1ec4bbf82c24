"""Straight-line numpy transcriptions of the papers' algorithms, in float64.

They import nothing from the package. A tree is a plain dict of arrays, ``grad(w)`` is
the gradient on the batch of the step, and every method returns ``d``, the gradient that
the base optimizer receives at the unperturbed ``w``. Methods that wrap an optimizer
return the weights of all steps instead, and take ``grad(t, w)``.
"""
