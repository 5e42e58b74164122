//! Who holds the removal of device-dax memory back while a guest uses it.
//!
//! A guest starts without anybody who does, so nothing here fails.

use daxhund_guard::DEFAULT_SOCKET;

use super::report::Row;
use super::roots::{Daemon, Live, Roots};

const CHECK: &str = "removal-guard";
/// `CAP_SYS_ADMIN`, as `capability.h` numbers it.
const SYS_ADMIN: u32 = 21;

pub(super) fn check(roots: &Roots, live: &dyn Live) -> Row {
    match live.guard_daemon() {
        Daemon::Answers => return Row::ok(CHECK, format!("daxhund-guardd, {DEFAULT_SOCKET}")),
        Daemon::Silent(why) => {
            return Row::warn(
                CHECK,
                format!("{DEFAULT_SOCKET} is there and does not answer: {why}"),
                "`systemctl restart daxhund-guardd.socket daxhund-guardd`, or have the user in the socket's group",
            );
        }
        Daemon::None => {}
    }
    if roots.may(SYS_ADMIN) {
        Row::ok(CHECK, "CAP_SYS_ADMIN: each VMM has a helper of its own")
    } else {
        Row::warn(
            CHECK,
            "no daxhund-guardd, and a helper needs CAP_SYS_ADMIN: a removal is found out when the memory is gone",
            "`systemctl enable --now daxhund-guardd.socket`, or run as root",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::super::testing::{FakeHost, FakeLive};
    use super::*;

    #[test]
    fn a_daemon_that_answers_is_enough() {
        let host = FakeHost::healthy();
        let row = check(host.roots(), &FakeLive::allowing());
        assert_eq!(row.status, Status::Ok);
        assert!(row.found.contains("daxhund-guardd"), "{row:?}");
    }

    #[test]
    fn a_daemon_that_is_silent_is_named_with_the_reason() {
        let host = FakeHost::healthy();
        let row = check(
            host.roots(),
            &FakeLive::with_daemon(Daemon::Silent("refused".into())),
        );
        assert_eq!(row.status, Status::Warn);
        assert!(row.found.ends_with("refused"), "{row:?}");
    }

    #[test]
    fn without_a_daemon_a_helper_takes_rights() {
        let host = FakeHost::healthy();
        let live = FakeLive::with_daemon(Daemon::None);
        let row = check(host.roots(), &live);
        assert_eq!(row.status, Status::Warn);
        assert!(row.mend.unwrap().contains("daxhund-guardd.socket"));
        host.write_proc("self/status", "CapEff:\t0000000000200000");
        assert_eq!(check(host.roots(), &live).status, Status::Ok);
    }
}
