"""The verifier: trusted code, which imports nothing of the prover. Import from the modules inside.

Read in this order:

    explanation  claims about a network, none of which is trusted
    proof        an explanation in a file; `AccuracyProof.check` is where a skeptic begins
    verify       the formula of the bound, and `verify`
    checks       conditions that a bound rests on: shapes, homomorphisms, permutations
    terms        all terms of the bound that do not depend on the pair, and all rounding
    reference    the loops, over pairs in numpy: slow, and meant to be read
    compiled     the loops over pairs compiled, tested against `reference`
    packing, structures   layouts of arrays, no arithmetic
    exact        exact accuracy by brute force, for pairs that are not certified

Letters of the paper (Wu et al., ICLR 2025) and of the formula in `verify`, with n the order of the
group, m the width of the network, and k the number of cluster representatives:

    letter     shape          meaning, and where it is computed or claimed
    x, y, z    -              elements of the group: inputs, output; z* = xy is `group.table[x, y]`
    l, r, u    n m, n m, m n  weights of u_i(z) relu(l_i(x) + r_i(y)): `structures.Weights`
    c          m              factor of a neuron and its representative: `Explanation.scale_factors`
    rho        n d d          irrep: `IrrepCircuit.matrices`; by entry: `checks.KnownIrreps.rho`
    M_i        d d            Fourier coefficient of u_i: `IrrepCircuit.coefficients`
    e_i        n              residual u_i(z) - <M_i, rho(z)>: `terms.build_terms`
    B, B'      -              rho-sets, by their permutations: `Grid.left_action`, `.right_action`
    p, p'      k, k           points of B and B' of each neuron: `Grid.left_points`, `.right_points`
    A_i, B_i   n, n           additive parts: `Explanation.additive_x`, `.additive_y`
    I_i        n n            interaction relu(l_i + r_i) - A_i - B_i: `reference.measure_pairs`
    T          |B| |B'|       interaction by points of rho-sets: `Grid.table`
    s_i        k              scale, I_i is about s_i T: `Grid.scale`
    D_i        n n            rest of the interaction, I_i - s_i T: `reference.measure_pairs`
    V          d d            sum of I_i M_i, for each x and y: `reference.measure_pairs`
    Vm         d d            mean of rho(x)^T V rho(y)^T: `IrrepCircuit.mean_matrix`
    gamma(g)   n              ideal margin <Vm, 1 - rho(g)>: `terms.build_terms`
"""
