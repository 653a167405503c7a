"S3 on this machine: moto's server. It serves one request at a time, as S3 itself checks and writes in one step, and moto's threads do not."
import os
from contextlib import contextmanager, suppress

from serving import serve


class S3Server:
    "A server on a free port of the loopback, with one bucket. `requests` are those that it got."

    def __init__(self, bucket="bucket"):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        class Quiet(MotoRequestHandler):
            def log_request(handler, *_):
                self.requests.append(handler.requestline)

        self.requests = []
        app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, app, threaded=False, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "recognisableSecret", "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true"}
        serve(self.server)
        self.client().create_bucket(Bucket=bucket)
        self.bucket = bucket

    def client(self):
        "A client of its own, to look at what is there."
        import boto3
        return boto3.client("s3", endpoint_url=self.url, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1")

    def files(self, prefix=""):
        "{key: bytes} below a prefix, without it."
        client, found, more = self.client(), {}, {}
        while True:
            page = client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **more)
            for entry in page.get("Contents", ()):
                with suppress(client.exceptions.NoSuchKey):  # given up in between
                    body = client.get_object(Bucket=self.bucket, Key=entry["Key"])["Body"].read()
                    found[entry["Key"].removeprefix(prefix)] = body
            if not page["IsTruncated"]:
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def close(self):
        self.server.shutdown()


@contextmanager
def in_environment(variables):
    "Inside the block variables have these values, and None are not set; nothing of S3 is remembered from before."
    import s3fs
    before = {name: os.environ.get(name) for name in variables}

    def put(values):
        for name, value in values.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    put(variables)
    try:
        yield
    finally:
        put(before)
