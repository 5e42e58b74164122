//! A client of a VMM's REST interface that looks at the clock, from the host on which the VMM runs.

use std::time::{Duration, Instant};

use lab_agent::pin_protocol::RestCall;
use serde_json::{Value, json};

use crate::{sockets, wait};

/// Pinning several GiB page by page is the longest that a request takes; an emulated host on a busy machine is slow.
const SILENCE: Duration = Duration::from_mins(3);

/// Adds a device of the host; the time is that of the request.
pub(crate) fn attach(socket: &str, path: &str, id: &str) -> Result<RestCall, String> {
    add(socket, "vm.add-device", &json!({ "path": path, "id": id }))
}

/// Adds a disk that a backend serves; the time is that of the request.
pub(crate) fn attach_disk(socket: &str, backend: &str, id: &str) -> Result<RestCall, String> {
    let disk = json!({ "vhost_user": true, "vhost_socket": backend, "id": id });
    add(socket, "vm.add-disk", &disk)
}

fn add(socket: &str, name: &str, what: &Value) -> Result<RestCall, String> {
    let body = what.to_string();
    let start = Instant::now();
    let answer = call(socket, "PUT", name, &body)?;
    Ok(told(start, answer))
}

/// Asks the guest to give a device up and waits until the VM has it no more; the time is that of all of it.
pub(crate) fn detach(socket: &str, id: &str, deadline: Duration) -> Result<RestCall, String> {
    let body = json!({ "id": id }).to_string();
    let start = Instant::now();
    call(socket, "PUT", "vm.remove-device", &body)?;
    let mut failure = None;
    let gone = wait::until(deadline, || match call(socket, "GET", "vm.info", "") {
        Ok(info) => (!names(&info, id)).then_some(()),
        Err(error) => {
            failure = Some(error);
            Some(())
        }
    });
    match (failure, gone) {
        (Some(error), _) => Err(error),
        (None, Some(())) => Ok(told(start, String::new())),
        (None, None) => Err(format!(
            "the VM still has {id} after {} s",
            deadline.as_secs()
        )),
    }
}

fn told(start: Instant, answer: String) -> RestCall {
    RestCall {
        took_ns: u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
        answer,
    }
}

/// A request that must succeed; gives the body of the answer.
fn call(socket: &str, method: &str, name: &str, body: &str) -> Result<String, String> {
    let answer = sockets::http(socket, method, &format!("/api/v1/{name}"), body, SILENCE)?;
    match answer.split_once('\n') {
        Some((status, body)) if status.starts_with('2') => Ok(body.to_owned()),
        _ => Err(format!("{method} {name} {body}: {answer}")),
    }
}

/// Whether JSON has a text somewhere, as a value or a key.
fn names(json: &str, text: &str) -> bool {
    json.contains(&json!(text).to_string())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::thread::{self, JoinHandle};

    use super::*;

    /// Answers requests in turn, one connection each; gives what it was asked.
    fn server(name: &str, answers: &'static [&'static str]) -> (PathBuf, JoinHandle<Vec<String>>) {
        let path = std::env::temp_dir().join(format!("lab-agent-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let serve = move || {
            let mut asked = Vec::new();
            for answer in answers {
                let mut stream = listener.accept().unwrap().0;
                let mut buffer = [0; 4096];
                let mut request = String::new();
                // One write of the client's may come in two.
                while !request.ends_with('}') && !request.ends_with("\r\n\r\n") {
                    let length = stream.read(&mut buffer).unwrap();
                    request.push_str(&String::from_utf8_lossy(&buffer[..length]));
                }
                asked.push(request);
                stream.write_all(answer.as_bytes()).unwrap();
            }
            asked
        };
        (path, thread::spawn(serve))
    }

    #[test]
    fn a_device_is_gone_when_the_vm_does_not_name_it() {
        let (path, server) = server(
            "detach",
            &[
                "HTTP/1.1 204 No Content\r\nA: b\r\n\r\n",
                "HTTP/1.1 200 OK\r\nA: b\r\n\r\n{\"devices\":[{\"id\":\"d0\"}]}",
                "HTTP/1.1 200 OK\r\nA: b\r\n\r\n{\"devices\":[{\"id\":\"d01\"}]}",
            ],
        );
        detach(path.to_str().unwrap(), "d0", Duration::from_mins(1)).unwrap();
        let asked = server.join().unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(asked[0].contains("PUT /api/v1/vm.remove-device") && asked[0].contains("\"d0\""));
        assert!(asked[2].contains("GET /api/v1/vm.info"));
    }

    #[test]
    fn a_refusal_is_told_whole() {
        let (path, server) = server("attach", &["HTTP/1.1 500 No\r\nA: b\r\n\r\n[\"why\"]"]);
        let message = attach(path.to_str().unwrap(), "/p", "d0").unwrap_err();
        server.join().unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(
            message.contains("500") && message.contains("why"),
            "{message}"
        );
    }
}
