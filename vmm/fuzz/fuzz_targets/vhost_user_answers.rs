//! A hostile vhost-user backend: whatever it answers, the frontend comes to an end with it; and one that is right is believed.
//!
//! All answers are in the socket before anything is asked, and no more can come: nobody waits.

#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use daxhund::memory::mapping::memfd;
use daxhund::virtio::vhost_user::testing::converse;
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const REPLY: u32 = 0b101;

const MQ: u64 = 1;
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;
const INFLIGHT: u64 = 1 << 12;
const SLOTS: u64 = 1 << 15;

/// An answer: the request's code, and the body.
type Answer = (u32, Vec<u8>);

fn words(code: u32, words: &[u64]) -> Answer {
    (
        code,
        words.iter().flat_map(|word| word.to_le_bytes()).collect(),
    )
}

/// What a backend with these protocol features answers to a frontend of two queues and two regions.
fn right(protocol: u64) -> Vec<Answer> {
    let mut answers = vec![
        words(1, &[1 << 32 | 1 << 30 | 1 << 9]),
        words(15, &[protocol]),
    ];
    let has = |feature| protocol & feature != 0;
    if has(MQ) {
        answers.push(words(17, &[4]));
    }
    let config: Vec<u8> = [0, 60, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    answers.push((24, [config, vec![7; 60]].concat()));
    if has(SLOTS) {
        answers.push(words(36, &[8]));
    }
    // An acknowledgement, or what is asked in its place.
    let done = |answers: &mut Vec<Answer>, code| {
        if has(REPLY_ACK) {
            answers.push(words(code, &[0]));
        }
    };
    let settled = |answers: &mut Vec<Answer>| {
        if !has(REPLY_ACK) {
            answers.push(words(1, &[1 << 32 | 1 << 30]));
        }
    };
    let memory = if has(SLOTS) { [37, 38] } else { [5, 5] };
    for _ in 0..2 {
        done(&mut answers, memory[0]);
        settled(&mut answers);
    }
    if has(INFLIGHT) {
        answers.push(words(31, &[4096, 0, 2 | 64 << 16]));
    }
    done(&mut answers, 2);
    if has(INFLIGHT) {
        done(&mut answers, 32);
    }
    for _ in 0..2 {
        for code in [8, 10, 9, 13, 12] {
            done(&mut answers, code);
        }
    }
    // The first queue with the start, the other one when it comes into use.
    for _ in 0..2 {
        done(&mut answers, 18);
        settled(&mut answers);
    }
    for queue in 0..2 {
        done(&mut answers, 18);
        answers.push(words(11, &[queue]));
    }
    for _ in 0..2 {
        done(&mut answers, memory[1]);
        settled(&mut answers);
    }
    answers
}

fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).expect("short");
    [&[code, flags, len].map(u32::to_le_bytes).concat(), body].concat()
}

fn descriptor() -> RawFd {
    static FILE: OnceLock<File> = OnceLock::new();
    FILE.get_or_init(|| memfd(4096, None).expect("a memfd"))
        .as_raw_fd()
}

fn send(stream: &UnixStream, bytes: &[u8], fds: usize) {
    // Not an error: no more room.
    let _ = stream.send_with_fds(&[bytes], &vec![descriptor(); fds]);
}

fuzz_target!(|data: &[u8]| {
    let (frontend, backend) = UnixStream::pair().expect("sockets");
    backend.set_nonblocking(true).expect("a socket");
    let mut input = Input::new(data);
    let bits = input.u8();
    let protocol = [MQ, REPLY_ACK, CONFIG, INFLIGHT, SLOTS];
    let protocol = protocol.iter().enumerate();
    // The wrong way round: most inputs have all of them.
    let protocol = protocol.filter(|(bit, _)| bits >> bit & 1 == 0);
    let protocol = protocol.fold(0, |all, (_, feature)| all | feature);
    let mut answers = right(protocol).into_iter();
    // Without the one there is no configuration space, without the other one queue.
    let mut is_right = protocol & CONFIG != 0 && protocol & MQ != 0;
    while !input.is_empty() {
        let chosen = input.u8();
        is_right &= chosen <= 0x7f;
        match chosen {
            0..=0x7f => {
                for (code, body) in answers.by_ref().take(usize::from(chosen % 16) + 1) {
                    send(
                        &backend,
                        &message(code, REPLY, &body),
                        usize::from(code == 31),
                    );
                }
            }
            0x80..=0xaf => {
                let Some((code, body)) = answers.next() else {
                    continue;
                };
                let mut bytes = message(code, REPLY, &body);
                for _ in 0..=chosen % 3 {
                    let at = usize::from(input.u8()) % bytes.len();
                    bytes[at] = input.u8();
                }
                send(&backend, &bytes, usize::from(code == 31));
            }
            0xb0..=0xbf => {
                let Some((code, _)) = answers.next() else {
                    continue;
                };
                let len = usize::from(input.u8());
                let body = input.bytes(len);
                send(
                    &backend,
                    &message(code, REPLY, body),
                    usize::from(chosen % 4),
                );
            }
            0xc0..=0xcf => drop(answers.next()),
            0xd0..=0xdf => {
                let code = u32::from(input.u8() % 48);
                let flags = u32::from(input.u8());
                let len = usize::from(input.u8());
                let body = input.bytes(len);
                send(
                    &backend,
                    &message(code, flags, body),
                    usize::from(chosen % 4),
                );
            }
            _ => {
                let len = usize::from(input.u8());
                send(&backend, input.bytes(len), usize::from(chosen % 4));
            }
        }
    }
    backend.shutdown(Shutdown::Write).expect("a socket");
    let ended = converse(frontend);
    if is_right && answers.next().is_none() {
        ended.expect("every answer is right");
    }
});
