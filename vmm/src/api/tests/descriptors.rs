//! Descriptors beside requests.

use std::io::{PipeReader, PipeWriter, pipe};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;
use crate::api::stream::MOST_DESCRIPTORS;

const ADD: &str = "PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";

impl Raw {
    /// Sends bytes with descriptors beside them.
    fn send_with(&mut self, bytes: &str, descriptors: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); 4096];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        let bytes = [std::io::IoSlice::new(bytes.as_bytes())];
        sendmsg(self.0.get_ref(), &bytes, &mut control, SendFlags::empty()).unwrap();
    }
}

fn pipes(count: usize) -> Vec<(PipeReader, PipeWriter)> {
    (0..count).map(|_| pipe().unwrap()).collect()
}

/// Waits until nobody holds the other end.
fn is_closed(mut reader: PipeReader) -> bool {
    let deadline = Timespec::try_from(DEADLINE).unwrap();
    let mut fds = [PollFd::new(&reader, PollFlags::IN)];
    poll(&mut fds, Some(&deadline)).unwrap() == 1 && reader.read(&mut [0]).unwrap() == 0
}

#[test]
fn add_net_takes_them_in_their_order() {
    let api = Api::start(Limits::default());
    let ends = pipes(2);
    let mut raw = api.raw();
    raw.send_with(ADD, &[ends[0].1.as_fd(), ends[1].1.as_fd()]);
    let Call { request, reply } = api.call();
    let Request::AddNet(_, descriptors) = request else {
        panic!("another request");
    };
    assert_eq!(descriptors.len(), 2);
    for ((mut reader, writer), (descriptor, sent)) in
        ends.into_iter().zip(descriptors.into_iter().zip(*b"ab"))
    {
        drop(writer);
        assert!(fcntl_getfd(&descriptor).unwrap().contains(FdFlags::CLOEXEC));
        rustix::io::write(&descriptor, &[sent]).unwrap();
        drop(descriptor);
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got.as_bytes(), [sent]);
    }
    reply.send(Ok(Reply::Empty)).unwrap();
    assert_eq!(raw.answer().status, 204);
}

#[test]
fn they_may_come_with_any_part_of_the_request() {
    let api = Api::start(Limits::default());
    let (head, body) = ADD.split_once("{}").map(|(head, _)| (head, "{}")).unwrap();
    for with_head in [true, false] {
        let (_reader, writer) = pipe().unwrap();
        let mut raw = api.raw();
        if with_head {
            raw.send_with(head, &[writer.as_fd()]);
            raw.send(body);
        } else {
            raw.send(head);
            raw.send_with(body, &[writer.as_fd()]);
        }
        let Request::AddNet(_, descriptors) = api.call().request else {
            panic!("another request");
        };
        assert_eq!(descriptors.len(), 1, "with the head: {with_head}");
    }
}

#[test]
fn the_client_sends_them() {
    let api = Api::start(Limits::default());
    let (reader, writer) = pipe().unwrap();
    let client = api.client();
    let asking = thread::spawn(move || {
        let body = Some(b"{\"num_queues\":2}".to_vec());
        client.call(Method::Put, "vm.add-net", body, vec![writer.into()])
    });
    let Call { request, reply } = api.call();
    let Request::AddNet(_, descriptors) = request else {
        panic!("another request");
    };
    assert_eq!(descriptors.len(), 1);
    reply.send(Ok(Reply::Empty)).unwrap();
    assert_eq!(asking.join().unwrap().unwrap().status, 204);
    drop(descriptors);
    assert!(is_closed(reader));
}

#[test]
fn those_nobody_takes_are_closed() {
    let api = Api::answering(|_| Ok(Reply::Empty));
    for request in [
        "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n",
        "PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n",
        "PUT /api/v1/vm.snapshot HTTP/1.1\r\n\r\n",
        "PUT /api/v1/vm.add-disk HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        "PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Length: 1\r\n\r\n{",
        "PUT /api/v1/vm.add-net HTTP/1.1\r\n\r\n",
    ] {
        let (reader, writer) = pipe().unwrap();
        let mut raw = api.raw();
        raw.send_with(request, &[writer.as_fd()]);
        drop(writer);
        raw.answer();
        assert!(is_closed(reader), "{request}");
    }
    // Nor do they stay with a connection whose request never comes, or comes to nothing.
    for bytes in ["G", "garbage\r\n\r\n", "GET /nowhere HTTP/1.1\r\n\r\n"] {
        let (reader, writer) = pipe().unwrap();
        let mut raw = api.raw();
        raw.send_with(bytes, &[writer.as_fd()]);
        drop((writer, raw));
        assert!(is_closed(reader), "{bytes:?}");
    }
}

#[test]
fn a_connection_does_not_keep_them_for_the_next_request() {
    let api = Api::start(Limits::default());
    let (reader, writer) = pipe().unwrap();
    let mut raw = api.raw();
    raw.send_with("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n", &[writer.as_fd()]);
    raw.answer();
    drop(writer);
    raw.send(ADD);
    let Request::AddNet(_, descriptors) = api.call().request else {
        panic!("another request");
    };
    assert!(descriptors.is_empty());
    assert!(is_closed(reader));
}

#[test]
fn there_can_be_too_many() {
    let api = Api::answering(|request| panic!("{request:?}"));
    let ends = pipes(MOST_DESCRIPTORS + 1);
    let descriptors: Vec<_> = ends.iter().map(|(_, writer)| writer.as_fd()).collect();
    let mut all_at_once = api.raw();
    all_at_once.send_with(ADD, &descriptors);
    let mut one_by_one = api.raw();
    let long = ADD.replace("\r\n\r\n", "\r\nX-Long: for as many as there are\r\n\r\n");
    for (descriptor, byte) in descriptors.iter().zip(long.chars()) {
        one_by_one.send_with(&byte.to_string(), &[*descriptor]);
    }
    one_by_one.send(&long[MOST_DESCRIPTORS + 1..]);
    for raw in [&mut all_at_once, &mut one_by_one] {
        let http = raw.answer();
        assert_eq!(http.status, 400);
        assert!(http.chain()[0].contains("64 are the most"), "{http:?}");
    }
    for (reader, writer) in ends {
        drop(writer);
        assert!(is_closed(reader));
    }
}
