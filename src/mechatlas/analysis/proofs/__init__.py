"""Group-operation networks: from weights to a guarantee. Import from the modules inside.

prove            weights, table -> a bound on the accuracy, with its proof
explain          the prover: looks for structure
rho_sets         finite sets of vectors that an irrep permutes
structure        coset concentration and bi-equivariance, as earlier work measures them
group_training   trains such networks
verifier/        the trusted code, which imports nothing of the above
"""
