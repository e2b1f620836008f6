-- One row per commit and modified file. Added, deleted and renamed files are left out.
SELECT
  changed.commit,
  changed.subject,
  changed.message,
  changed.repos,
  changed.licenses,
  file.old_path AS old_file,
  file.new_path AS new_file,
  file.old_mode,
  file.new_mode,
  file.old_sha1,
  file.new_sha1
FROM commits_table_dedup_difference AS changed
CROSS JOIN UNNEST(changed.difference) AS file
WHERE file.old_path = file.new_path  -- neither is NULL
