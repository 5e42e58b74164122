//! A hostile frontend with a hostile guest, which comes and comes again while the host wants the memory back or does not: the
//! daemon lives, nobody gets what another has, and nothing of a session is left behind when its frontend has closed what it had.

#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use clap::Parser;
use daxhund_dax::Host;
use daxhund_fuzz_support::frontend::codes::{
    ADD_MEM_REG, GET_CONFIG, GET_MAX_MEM_SLOTS, GET_SHMEM_CONFIG, REM_MEM_REG, SET_CONFIG,
};
use daxhund_fuzz_support::frontend::{Frontend, NEED_REPLY, PLAIN, USER, memory};
use daxhund_fuzz_support::input::Input;
use daxhund_fuzz_support::session::{self, LIMIT};
use daxhund_fuzz_support::{leaves_no_descriptor, threads};
use daxhund_vhost_user::session::Session;
use daxhund_vhost_user_pmem::args::Args;
use daxhund_vhost_user_pmem::backend::Backend;
use daxhund_vhost_user_pmem::config::Config;
use daxhund_vhost_user_pmem::daemon::NOUNS;
use daxhund_vhost_user_pmem::lender::Lender;
use daxhund_vhost_user_pmem::metrics::Metrics;
use daxhund_vhost_user_pmem_fuzz::channel::Channel;
use daxhund_vhost_user_pmem_fuzz::requests::offer;
use libfuzzer_sys::fuzz_target;
use vhost_user_backend::VhostUserBackend;

/// Bytes that are lent.
const RANGE: u64 = 2 << 20;
/// Where the guest has them, when it has them as memory.
const AT: u64 = 1 << 30;
/// One frontend comes so often at most.
const SESSIONS: usize = 4;

const BACKEND_REQ: u64 = 1 << 5;
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;
const BACKEND_SEND_FD: u64 = 1 << 10;
const SLOTS: u64 = 1 << 15;
const SHMEM: u64 = 1 << 22;
const PROTOCOL: u64 = REPLY_ACK | BACKEND_REQ | CONFIG | BACKEND_SEND_FD | SLOTS | SHMEM;
/// Not offered: MQ.
const NOT_OFFERED: u64 = 1;

/// The file for all runs: a lock that one has left is in the way of the next.
fn file() -> &'static (File, Config) {
    static FILE: OnceLock<(File, Config)> = OnceLock::new();
    FILE.get_or_init(|| {
        let file = memory(RANGE);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let args = Args::try_parse_from(["fuzz", "--file", &path]).expect("words");
        (file, Config::try_from(args).expect("a configuration"))
    })
}

fn lender(read_only: bool, rejoin: bool) -> Lender {
    let config = Config {
        read_only,
        rejoin,
        ..file().1.clone()
    };
    Lender::open(&Host::system(), &config).expect("nobody else has the range")
}

/// The daemon's part of it, and the host's.
struct World {
    lender: Arc<Lender>,
    metrics: Arc<Metrics>,
    session: Session<Backend>,
    /// Those that there were before. Nobody waits for the daemon's that ask a frontend: they end with their channel.
    threads: usize,
    /// How many flushes were done when the memory was let go of: there are not to be more.
    flushes_at_loss: Option<u64>,
}

impl World {
    fn start(lender: Arc<Lender>) -> (Self, Frontend) {
        let threads = threads().expect("a list");
        let metrics = Arc::new(Metrics::default());
        let backend = Backend::new(Arc::clone(&lender), Arc::clone(&metrics));
        let (session, stream) = session::connect(backend, NOUNS);
        let world = Self {
            lender,
            metrics,
            session,
            threads,
            flushes_at_loss: None,
        };
        (world, Frontend::new(stream, 1))
    }

    /// The frontend goes and comes again, as the daemon's loop has it.
    fn again(self, frontend: &mut Frontend) -> Self {
        session::end(self.session, frontend);
        let lender = self.lender;
        if !lender.is_let_go() {
            lender.renew();
            let is_theirs = !lender.is_read_only() && !frontend.lent().is_empty();
            assert!(
                !is_theirs || lender.lend().is_err(),
                "what one has is lent to another"
            );
        }
        let backend = Backend::new(Arc::clone(&lender), Arc::clone(&self.metrics));
        let (session, stream) = session::connect(backend, NOUNS);
        frontend.reconnected(stream);
        Self {
            lender,
            session,
            ..self
        }
    }

    /// The host wants the memory, or thinks better of it.
    fn removal(&mut self, how: u8, frontend: &Frontend) {
        match how {
            0..=5 => self.session.device().ask_back(),
            6..=9 => {
                let _ = self.session.device().has_given_back();
                self.lender.let_go();
                self.is_lost_from_now_on();
                let is_free = self.lender.is_free().expect("the file is there");
                assert!(
                    !is_free || frontend.lent().is_empty(),
                    "what the frontend has is free"
                );
                if is_free {
                    self.lender.lose();
                }
            }
            10..=14 => {
                if self.lender.is_let_go() {
                    self.flushes_are_none();
                    self.flushes_at_loss = None;
                    self.lender.renew();
                    self.session.device().look_again();
                }
            }
            _ => {
                self.lender.lose();
                self.is_lost_from_now_on();
            }
        }
    }

    fn is_lost_from_now_on(&mut self) {
        self.flushes_are_none();
        // When this returns, no batch is under way that has begun before.
        self.session.device().stop_vring(0).expect("it stops");
        self.flushes_at_loss = Some(self.metrics.flushes.get());
    }

    fn flushes_are_none(&self) {
        if let Some(flushes) = self.flushes_at_loss {
            assert_eq!(
                self.metrics.flushes.get(),
                flushes,
                "memory that is gone was made durable"
            );
        }
    }

    /// The frontend closes what it had, and the range is to be had again.
    fn end(self, frontend: Frontend, channels: Vec<Channel>) {
        session::end(self.session, &frontend);
        drop((frontend, channels));
        let by = Instant::now() + LIMIT;
        while threads().expect("a list") > self.threads {
            assert!(
                Instant::now() < by,
                "a frontend is asked that has closed its channels"
            );
            std::thread::yield_now();
        }
        if !self.lender.is_lost() {
            self.lender.renew();
            self.lender.lend().expect("nobody has the range");
        }
    }
}

/// A handshake with something amiss, or nothing, and how the memory can be lent.
fn shake_hands(frontend: &Frontend, channels: &mut Vec<Channel>, how: u8, input: &mut Input<'_>) {
    let amiss = input.u8();
    let without = [REPLY_ACK, SHMEM, BACKEND_REQ, BACKEND_SEND_FD | CONFIG];
    let without = (0..).zip(without).filter(|(bit, _)| amiss >> bit & 1 == 1);
    let mut protocol = without.fold(PROTOCOL, |all, (_, feature)| all & !feature);
    if amiss & 0x10 != 0 {
        protocol |= NOT_OFFERED;
    }
    frontend.greet(protocol);
    if amiss & 0x20 == 0 {
        channels.extend(Channel::open(frontend, how));
    }
    match amiss >> 6 {
        0 => frontend.accept(1 | u64::from(input.u8() % 4) << 28),
        1 => frontend.accept(u64::from(input.u16()) << 16 | u64::from(input.u8())),
        // Later: it may have to show first that it has the memory.
        _ => {}
    }
}

/// What a frontend asks of the device's configuration.
fn configure(frontend: &Frontend, how: u8, input: &mut Input<'_>) {
    let (offset, size) = (u32::from(input.u8()), u32::from(input.u8()));
    let code = match how {
        0..=7 => GET_CONFIG,
        8..=9 => SET_CONFIG,
        10..=12 => return frontend.send(GET_SHMEM_CONFIG, PLAIN, &[], &[]),
        _ => return frontend.send(GET_MAX_MEM_SLOTS, PLAIN, &[], &[]),
    };
    let mut body = [offset, size, 0].map(u32::to_le_bytes).concat();
    body.resize(body.len() + size as usize, 0xa5);
    frontend.send_bytes(code, PLAIN, &body, &[]);
}

/// The frontend has what it was lent among its guest's memory, or has not any more.
fn show(frontend: &Frontend, how: u8) {
    let region = [0, AT, RANGE, USER + AT, 0];
    match (how, frontend.lent().last()) {
        (0..=9, Some(lent)) => frontend.send(ADD_MEM_REG, NEED_REPLY, &region, &[lent.as_raw_fd()]),
        _ => frontend.send(REM_MEM_REG, NEED_REPLY, &region, &[]),
    }
}

fn play(mut world: World, mut frontend: Frontend, input: &mut Input<'_>) {
    let mut channels = Vec::new();
    let mut sessions = 1;
    while !input.is_empty() {
        let chosen = input.u8();
        let how = chosen >> 4;
        match chosen % 16 {
            0 => shake_hands(&frontend, &mut channels, how, input),
            7 => {
                offer(&mut frontend, how, input);
                frontend.kick(0);
            }
            10 if how == 15 => frontend.accept(1),
            10 => channels.extend(Channel::open(&frontend, how)),
            11 => {
                if let Some(channel) = channels.last_mut() {
                    channel.answer(&mut frontend, how, input);
                }
            }
            12 => configure(&frontend, how, input),
            13 => show(&frontend, how),
            14 => world.removal(how, &frontend),
            15 if how < 8 => frontend.give_back(),
            15 if sessions < SESSIONS => {
                sessions += 1;
                world = world.again(&mut frontend);
            }
            deed => frontend.act(deed, how, input),
        }
    }
    world.flushes_are_none();
    world.end(frontend, channels);
}

/// One range from its first session to its last.
fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let first = input.u8();
    let (read_only, rejoins) = (first & 1 != 0, first & 2 != 0);
    // What the guest of a daemon has that was killed.
    let kept = rejoins.then(|| {
        let lent = lender(read_only, false).lend().expect("it is ours");
        lent.try_clone().expect("a descriptor")
    });
    let (world, mut frontend) = World::start(Arc::new(lender(read_only, rejoins)));
    if let Some(kept) = kept {
        frontend.keep(kept);
    }
    play(world, frontend, &mut input);
}

/// A handshake and memory: what is there once for the whole process is there after it.
const FIRST: &[u8] = &[0, 0, 0, 0, 1];

fuzz_target!(|data: &[u8]| {
    leaves_no_descriptor(run, FIRST, data);
    assert_eq!(file().0.metadata().expect("a memfd").len(), RANGE);
});
