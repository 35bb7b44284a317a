#!/usr/bin/env bash
# Pinned: http-proxy 1.18.1 (npm), waitress 3.0.2. Seen with Node.js 20 and Python 3.11, on
#   Linux with IPv6.
#
# Expected: with xfwd in http-proxy and trusted_proxy in waitress, REMOTE_ADDR is the address
#   of the client, be it IPv4 or IPv6.
# Seen: a Node.js server listens at :: unless told otherwise, and there an IPv4 client is
#   ::ffff:127.0.0.1. http-proxy sends that on in X-Forwarded-For. waitress puts brackets
#   around an IPv6 address only if it has no dot, then takes what follows the last colon for
#   the port: REMOTE_ADDR is ::ffff, and REMOTE_PORT is 127.0.0.1. So all IPv4 clients are
#   one client. IPv6 clients are right, and so are IPv4 clients if Node.js listens at 0.0.0.0.
# For a raffle: with one ticket for each address, the first IPv4 player gets a ticket, and
#   all others hear that they have one. A test on IPv6, or with one player, finds nothing.
#   Let the proxy listen at 0.0.0.0 and :: apart, or send the address without ::ffff:.
set -euo pipefail

folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT
for tool in node npm; do
  command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
echo "Node.js $(node --version)"
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check waitress==3.0.2
npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$folder" http-proxy@1.18.1

cat > "$folder/service.py" <<'PYTHON'
import waitress


def service(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['HTTP_X_FORWARDED_FOR']} is {environ['REMOTE_ADDR']}".encode()]


server = waitress.create_server(
    service, host="127.0.0.1", port=0, trusted_proxy="127.0.0.1",
    trusted_proxy_headers="x-forwarded-for", clear_untrusted_proxy_headers=True)
print(server.effective_port, flush=True)
server.run()
PYTHON
"$folder/env/bin/python" "$folder/service.py" > "$folder/port" &
server=$!
for _ in $(seq 100); do
  [ -s "$folder/port" ] && break
  sleep 0.1
done

cat > "$folder/proxy.js" <<'JAVASCRIPT'
const http = require("http");
const { createProxyServer } = require("http-proxy");

const target = `http://127.0.0.1:${process.argv[2]}`;

const ask = (port, host, localAddress) => new Promise((resolve, reject) => {
  http.get({ port, host, localAddress, agent: false }, async (response) => {
    resolve((await response.setEncoding("utf8").toArray()).join(""));
  }).on("error", reject);
});

const listen = (...address) => new Promise((resolve) => {
  const proxy = createProxyServer({ target, xfwd: true });
  const server = http.createServer((request, response) => proxy.web(request, response));
  server.listen(0, ...address, () => resolve(server.address().port));
});

(async () => {
  for (const [name, port] of [["no address", await listen()],
                              ["0.0.0.0", await listen("0.0.0.0")]]) {
    for (const client of ["127.0.0.1", "127.0.0.2", "127.0.0.3"]) {
      console.log(`${name}: ${client} sent as`, await ask(port, "127.0.0.1", client));
    }
    if (name === "no address") console.log(`${name}: ::1 sent as`, await ask(port, "::1", "::1"));
  }
  process.exit();
})();
JAVASCRIPT
seen=$(node "$folder/proxy.js" "$(cat "$folder/port")")
echo "$seen"

stated='no address: 127.0.0.1 sent as ::ffff:127.0.0.1 is ::ffff
no address: 127.0.0.2 sent as ::ffff:127.0.0.2 is ::ffff
no address: 127.0.0.3 sent as ::ffff:127.0.0.3 is ::ffff
no address: ::1 sent as ::1 is ::1
0.0.0.0: 127.0.0.1 sent as 127.0.0.1 is 127.0.0.1
0.0.0.0: 127.0.0.2 sent as 127.0.0.2 is 127.0.0.2
0.0.0.0: 127.0.0.3 sent as 127.0.0.3 is 127.0.0.3'
if [ "$seen" != "$stated" ]; then
  printf 'The behaviour has changed. It was:\n%s\n' "$stated" >&2
  exit 1
fi
