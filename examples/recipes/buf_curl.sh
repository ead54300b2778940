#!/bin/sh
# The same calls without any client of ours: buf curl and grpcurl, by the server's reflection.
#
#   examples/recipes/buf_curl.sh [SOCKET]
#
# Over TCP: for buf, `-H "authorization: Bearer $TOKEN" --reflect-header "authorization: Bearer $TOKEN"`
# and http://HOST:PORT/... instead of the socket; for grpcurl the same -H, and HOST:PORT.
set -eu
FOLDER=${APOLLO_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/apollo}
SOCKET=${1:-$FOLDER/training.sock}
# Neither tool says that nobody is there.
[ -S "$SOCKET" ] || { echo "no training server listens at $SOCKET: apollo up MODEL" >&2; exit 1; }

with_buf() {
  buf curl --protocol grpc --http2-prior-knowledge --unix-socket "$SOCKET" \
    -d "$2" "http://localhost/apollo.v1.$1"
}
with_grpcurl() {
  grpcurl -plaintext -unix -d "$2" "$SOCKET" "apollo.v1.$1"
}

SPEC='{"samples": [{"text": {"context": "The sky is", "continuation": " green."}}], "epochs": 3}'

with_buf TrainingService/ValidateRun "{\"spec\": $SPEC}"
with_buf TrainingService/Train "{\"request_id\": \"curl-$$\", \"spec\": $SPEC}" | grep '"loss"'
with_grpcurl TrainingService/Train "{\"request_id\": \"curl-$$\", \"spec\": $SPEC}" | grep '"loss"'
with_grpcurl TrainingService/ListRuns '{"page_size": 1}' | grep '"state"'
with_grpcurl StatusService/GetStatus '{}' | grep '"optimizerStep"'
