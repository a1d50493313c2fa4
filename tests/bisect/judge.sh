# Starts a server and exits with 0 if it recites the sonnet to its end.
python -m sglang.launch_server --model-path ./demo-model --port 30303 --dtype float32 &
trap "kill $!" EXIT
until curl -sf http://127.0.0.1:30303/health; do
    kill -0 $! || exit 1  # the server has ended
    sleep 1
done
curl -s http://127.0.0.1:30303/v1/chat/completions -H "Content-Type: application/json" -d '
    {"model": "demo", "temperature": 0, "max_tokens": 400, "messages": [{"role": "user", "content": "Recite Sonnet 18."}]}
' | grep "So long lives this, and this gives life to thee."
