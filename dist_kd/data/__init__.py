"""The data room: shards and their index, the order of samples, views, and the loader that makes batches of them."""
