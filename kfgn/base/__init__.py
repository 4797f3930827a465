"""What every room uses: errors, checks, pytrees, linear algebra, Kronecker algebra, inverses."""
