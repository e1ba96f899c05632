"""The gateway to KServe v2 clients, among them Triton's."""
