"""compax: compiler passes for JAX."""

if __name__ != "compax":
    raise ImportError(
        "this folder is the package 'compax': install the checkout (pip install -e .) and write 'import compax'"
    )
