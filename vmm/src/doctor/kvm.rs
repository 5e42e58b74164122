//! KVM: present, permitted, complete, and with nested paging.

use super::report::Row;
use super::roots::{Live, Roots};
use crate::chain;
use crate::kvm::OpenError;

pub(super) fn check(roots: &Roots, live: &dyn Live) -> Vec<Row> {
    vec![device(roots, live), nested_paging(roots)]
}

fn device(roots: &Roots, live: &dyn Live) -> Row {
    let node = roots.dev("kvm");
    let shown = node.display();
    let error = match live.kvm(&node) {
        Ok(max) => {
            let found =
                format!("{shown}: API 12, every capability daxhund needs, up to {max} vCPUs");
            return Row::ok("kvm", found);
        }
        Err(error) => error,
    };
    let (found, mend) = match &error {
        OpenError::Missing { .. } => (
            format!("{shown} does not exist"),
            "`modprobe kvm_amd` or `modprobe kvm_intel`; enable virtualisation (SVM, VT-x) in the firmware",
        ),
        OpenError::NotPermitted {
            uid,
            owner,
            group,
            mode,
            ..
        } => (
            format!(
                "uid {uid} may not open {shown}, which belongs to {owner}:{group} with mode {mode:04o}"
            ),
            "`usermod -aG kvm NAME` and a new login, or run as root",
        ),
        _ => (
            chain(&error),
            "see `dmesg | grep kvm`; daxhund needs Linux 6.1 or later",
        ),
    };
    Row::fail("kvm", found, mend)
}

fn nested_paging(roots: &Roots) -> Row {
    for (module, parameter) in [("kvm_amd", "npt"), ("kvm_intel", "ept")] {
        let value = roots.sys_text(&format!("module/{module}/parameters/{parameter}"));
        match value.as_deref() {
            Some("Y" | "1") => {
                return Row::ok("nested-paging", format!("{module} has {parameter}"));
            }
            Some(_) => {
                return Row::warn(
                    "nested-paging",
                    format!(
                        "{module} runs without {parameter}: guests are slow and get no huge entries"
                    ),
                    format!(
                        "`modprobe -r {module} && modprobe {module} {parameter}=1`; the CPU must have it"
                    ),
                );
            }
            None => {}
        }
    }
    Row::warn(
        "nested-paging",
        "neither kvm_amd nor kvm_intel is loaded, so it can't be told",
        "`modprobe kvm_amd` or `modprobe kvm_intel`",
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::super::testing::{FakeHost, FakeLive, row};
    use super::*;

    #[test]
    fn no_kvm_fails_and_names_the_modules() {
        let host = FakeHost::healthy();
        host.remove_dev("kvm");
        let rows = check(host.roots(), &FakeLive::allowing());
        let kvm = row(&rows, "kvm");
        assert_eq!(kvm.status, Status::Fail);
        assert!(kvm.found.ends_with("/kvm does not exist"), "{kvm:?}");
        assert!(kvm.mend.as_ref().unwrap().contains("modprobe kvm_amd"));
    }

    #[test]
    fn no_permission_names_owner_and_group() {
        let host = FakeHost::healthy();
        let rows = check(host.roots(), &FakeLive::refusing("kvm"));
        let kvm = row(&rows, "kvm");
        assert_eq!(kvm.status, Status::Fail);
        assert!(
            kvm.found.contains("belongs to 0:104 with mode 0660"),
            "{kvm:?}"
        );
        assert!(kvm.mend.as_ref().unwrap().contains("usermod -aG kvm"));
    }

    #[test]
    fn nested_paging_off_or_unknown_warns() {
        let host = FakeHost::healthy();
        host.write_sys("module/kvm_amd/parameters/npt", "N");
        let off = nested_paging(host.roots());
        assert_eq!(off.status, Status::Warn);
        assert!(off.mend.unwrap().contains("modprobe kvm_amd npt=1"));
        host.write_sys("module/kvm_amd/parameters/npt", "1");
        assert_eq!(nested_paging(host.roots()).status, Status::Ok);
        assert_eq!(
            nested_paging(FakeHost::empty().roots()).status,
            Status::Warn
        );
    }
}
