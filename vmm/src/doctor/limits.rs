//! Nodes, the locked-memory limit, and huge pages for memory that is not device-dax.

use daxhund_dax::ByteSize;

use super::report::Row;
use super::roots::Roots;

pub(super) fn check(roots: &Roots) -> Vec<Row> {
    vec![
        nodes(roots),
        memlock(roots),
        huge_pages(roots, "2M", 2048),
        huge_pages(roots, "1G", 1 << 20),
        transparent(roots),
    ]
}

fn nodes(roots: &Roots) -> Row {
    const NODES: &str = "devices/system/node";
    let mut nodes: Vec<u32> = roots
        .sys_names(NODES)
        .iter()
        .filter_map(|name| name.strip_prefix("node")?.parse().ok())
        .collect();
    nodes.sort_unstable();
    if nodes.is_empty() {
        return Row::ok("numa", "a kernel without NUMA");
    }
    let described: Vec<_> = nodes
        .iter()
        .map(|node| {
            let attribute = |name: &str| roots.sys_text(&format!("{NODES}/node{node}/{name}"));
            let cpus = match attribute("cpulist").as_deref() {
                None | Some("") => "no CPUs".to_owned(),
                Some(list) => format!("CPUs {list}"),
            };
            let memory = attribute("meminfo").and_then(|text| total_mib(&text));
            let memory =
                memory.map_or_else(|| "memory unknown".to_owned(), |mib| format!("{mib} MiB"));
            format!("node {node}: {cpus}, {memory}")
        })
        .collect();
    Row::ok("numa", described.join("; "))
}

/// `Node 0 MemTotal:       24654188 kB`
fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.contains(" MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(3)?.parse().ok()?;
    Some(kib >> 10)
}

/// device-dax pages pinned through VFIO type1 are not counted; all other pinned guest memory is.
fn memlock(roots: &Roots) -> Row {
    const CAP_IPC_LOCK: u32 = 14;
    let limit = roots
        .proc_text("self/limits")
        .and_then(|text| soft_memlock(&text));
    match limit {
        _ if roots.may(CAP_IPC_LOCK) => {
            Row::ok("memlock", "CAP_IPC_LOCK: the limit does not apply")
        }
        Some(Limit::Unlimited) => Row::ok("memlock", "unlimited"),
        limit => {
            let found = match limit {
                Some(Limit::Bytes(bytes)) => ByteSize(bytes).to_string(),
                _ => "the limit can't be read".to_owned(),
            };
            Row::warn(
                "memlock",
                format!(
                    "{found}: pinning more than that fails (not counted: device-dax through VFIO type1)"
                ),
                "`ulimit -l unlimited`, or LimitMEMLOCK=infinity in the service's unit",
            )
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Unlimited,
    Bytes(u64),
}

/// `Max locked memory         8388608              8388608              bytes`
fn soft_memlock(limits: &str) -> Option<Limit> {
    let values = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    match values.split_whitespace().next()? {
        "unlimited" => Some(Limit::Unlimited),
        bytes => bytes.parse().ok().map(Limit::Bytes),
    }
}

fn huge_pages(roots: &Roots, size: &str, kib: u64) -> Row {
    let check = format!("hugepages-{size}");
    let dir = format!("kernel/mm/hugepages/hugepages-{kib}kB");
    let count = |name: &str| roots.sys_number(&format!("{dir}/{name}"));
    match (count("nr_hugepages"), count("free_hugepages")) {
        (Some(0), _) => Row::ok(check, "none reserved; only hugepages=on needs them"),
        (Some(all), Some(free)) => Row::ok(check, format!("{free} of {all} free")),
        _ => Row::warn(
            check,
            format!("this kernel has no {size} huge pages"),
            format!(
                "a kernel with CONFIG_HUGETLBFS and, for 1G, a CPU with pdpe1gb; not needed for {DAX}"
            ),
        ),
    }
}

const DAX: &str = "device-dax";

fn transparent(roots: &Roots) -> Row {
    const ENABLED: &str = "kernel/mm/transparent_hugepage/enabled";
    let text = roots.sys_text(ENABLED);
    let chosen = text
        .as_deref()
        .and_then(|text| text.split_once('[')?.1.split_once(']'))
        .map(|(chosen, _)| chosen);
    match chosen {
        Some(chosen @ ("always" | "madvise")) => Row::ok("thp", chosen),
        Some(other) => Row::warn(
            "thp",
            format!("{other}: anonymous guest memory runs on 4K entries"),
            format!("`echo madvise > /sys/{ENABLED}`"),
        ),
        None => Row::warn(
            "thp",
            "this kernel has none: anonymous guest memory runs on 4K entries",
            format!("a kernel with CONFIG_TRANSPARENT_HUGEPAGE; not needed for {DAX}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::super::testing::FakeHost;
    use super::*;

    #[test]
    fn nodes_are_listed_with_cpus_and_memory() {
        let host = FakeHost::healthy();
        let found = nodes(host.roots()).found;
        assert_eq!(
            found,
            "node 0: CPUs 0-1, 7976 MiB; node 1: no CPUs, 2046 MiB"
        );
    }

    #[test]
    fn a_memlock_limit_warns_unless_it_does_not_apply() {
        let host = FakeHost::healthy();
        host.write_proc("self/limits", "Max locked memory  8388608  8388608  bytes");
        let limited = memlock(host.roots());
        assert_eq!(limited.status, Status::Warn);
        assert!(limited.found.starts_with("8M:"), "{limited:?}");
        host.write_proc("self/status", "Name:\tx\nCapEff:\t0000000000004000");
        assert_eq!(memlock(host.roots()).status, Status::Ok);
        host.write_proc("self/status", "CapEff:\t000001ffffffbfff");
        assert_eq!(memlock(host.roots()).status, Status::Warn);
        let unreadable = memlock(FakeHost::empty().roots());
        assert!(unreadable.found.contains("can't be read"), "{unreadable:?}");
    }

    #[test]
    fn huge_pages_are_counted() {
        let host = FakeHost::healthy();
        assert_eq!(huge_pages(host.roots(), "2M", 2048).found, "48 of 64 free");
        let none = huge_pages(host.roots(), "1G", 1 << 20);
        assert!(none.found.starts_with("none reserved"), "{none:?}");
        assert_eq!(huge_pages(host.roots(), "16M", 16384).status, Status::Warn);
    }

    #[test]
    fn transparent_huge_pages_read_the_chosen_word() {
        let host = FakeHost::healthy();
        for (text, status) in [
            ("[always] madvise never", Status::Ok),
            ("always [madvise] never", Status::Ok),
            ("always madvise [never]", Status::Warn),
            ("garbled", Status::Warn),
        ] {
            host.write_sys("kernel/mm/transparent_hugepage/enabled", text);
            assert_eq!(transparent(host.roots()).status, status, "{text}");
        }
    }
}
