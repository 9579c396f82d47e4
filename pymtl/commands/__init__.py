"""The subcommands of ``pymtl``, one module each: ``add_parser`` describes it, ``run`` does it."""
